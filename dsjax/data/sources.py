# SPDX-License-Identifier: Apache-2.0
"""The sources of the `data` section -> their rows, under the names that formats know.

In: paths, patterns of paths, ids of hub datasets. Out: the rows of each file or dataset, in order.
Not here: reading one of them (`files`), which rows are held out (`held_out`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from dsjax.buckets import connect, reason
from dsjax.config import DataSection
from dsjax.config.inputs import find_sources, is_dataset_id, is_pattern
from dsjax.config.paths import is_url
from dsjax.data.columns import Columns
from dsjax.data.files import RowIterator, read_rows
from dsjax.errors import ConfigError


class Source(NamedTuple):
    """A file or hub dataset: its config path, its name, its rows."""

    field: str
    name: str
    rows: RowIterator


def open_sources(
    sources: Sequence[str], section: DataSection, name: str, columns: Columns
) -> list[Source]:
    """Open all sources: what is not there is found before anything is read.

    Args:
      sources: `section.train` or `section.eval`.
      section: subset and split of hub datasets.
      name: config path of `sources`.
      columns: `section.column_mapping`.

    Raises:
      ConfigError: a source is not there, or is none.
    """
    opened = []
    for index, source in enumerate(sources):
        field = f"{name}[{index}]"
        for found in _find_urls(source, field) or find_sources(source, field):
            rows = read_rows(found, field, _splits(section, name), section.subset, columns)
            opened.append(Source(field, found, rows))
    return opened


def _find_urls(source: str, field: str) -> list[str]:
    """Name the files that a pattern of URLs matches, sorted; of any other source none."""
    if not is_url(source) or not is_pattern(source):
        return []
    system, path = connect(source, field)
    try:
        found = sorted(map(str, system.glob(path)))
    except Exception as error:  # every store's library has its own classes
        raise ConfigError(
            f"{field}: got {source}, expected a bucket that can be listed ({reason(error)})"
        ) from error
    if not found:
        raise ConfigError(
            f"{field}: got {source}, which matches no file, expected one or more; * and ? stand "
            "for part of a name, ** for folders in folders"
        )
    return [system.unstrip_protocol(name) for name in found]


def unused_keys(section: DataSection) -> list[str]:
    """Keys that the user gave and that have no hub dataset to be of."""
    if any(is_dataset_id(source) for source in (*section.train, *(section.eval or ()))):
        return []
    return [f"data.{key}" for key in ("subset", "split") if getattr(section, key) is not None]


def _splits(section: DataSection, name: str) -> tuple[str, ...]:
    if section.split is not None:
        return (section.split,)
    return ("validation", "test") if name == "data.eval" else ("train",)
