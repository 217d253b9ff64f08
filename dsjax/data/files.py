# SPDX-License-Identifier: Apache-2.0
"""Sources -> rows, each with the place it came from.

In: a path, a URL or the id of a hub dataset. Out: `(origin, fields)` pairs, one at a time; origin
is `FILE:LINE` (for Parquet and the hub the number of the row, from 1), which every later complaint
about the row repeats. Local files are parsed here, not by `datasets`: its readers infer one type
per column, so they fail on rows of mixed shape and cannot say which line is wrong.
Plain text (.txt) is one row per non-empty line. Whatever a reader meets in a damaged file is a
refusal that begins with the file's name. Not here: the syntax of JSON (`json_reader`) and CSV
(`csv_reader`), what the fields mean (`formats`).
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet

from dsjax import signals
from dsjax.buckets import Bucket
from dsjax.config.inputs import check_source, is_dataset_id
from dsjax.config.paths import is_url
from dsjax.data.columns import Columns
from dsjax.data.csv_reader import csv_rows
from dsjax.data.json_reader import json_file, json_lines, parse_json
from dsjax.errors import ConfigError, renamed

RowIterator = Iterator[tuple[str, dict[str, Any]]]

STRUCTURED = ("messages", "conversations", "history", "input_ids", "labels", "attention_mask")
DEEPEST = 100
"""Levels of lists and objects in a row: no data has so many, and Python's own limit is not far."""
INNER = (str, dict, list, tuple)


def read_rows(
    source: str,
    field: str,
    splits: tuple[str, ...],
    subset: str | None = None,
    columns: Columns | None = None,
) -> RowIterator:
    """Yield the rows of one file or hub dataset.

    Args:
      source: path, URL, or hub id.
      field: config path of the source, for messages (`data.train[0]`).
      splits: splits of a hub dataset to try, in order.
      subset: subset (configuration) of a hub dataset; None: its default.
      columns: renames the rows' columns.

    Raises:
      ConfigError: nothing there, a folder, an unknown kind of file, or a row that does not parse.
    """
    check_source(source, field)
    columns = columns or Columns({})
    if is_url(source):
        return _remote_rows(source, field, columns)
    path = Path(source).expanduser()
    if is_dataset_id(source):
        return _hub_rows(source, field, splits, subset, columns)
    return _file_rows(path, path.suffix, columns)


def _remote_rows(url: str, field: str, columns: Columns) -> RowIterator:
    """Yield the rows of a file behind a URL, which is copied to this machine while it is read."""
    folder, _, name = url.rpartition("/")
    with (
        tempfile.TemporaryDirectory(prefix="dsjax-data-") as here,
        signals.undone(partial(shutil.rmtree, here, ignore_errors=True)),
    ):
        path = Path(here, name)
        try:
            Bucket.open(folder, field).download(name, path)
        except FileNotFoundError as error:
            raise ConfigError(f"{field}: got {url}, expected a file that exists") from error
        with renamed({f"{path}": url}):
            for origin, fields in _file_rows(path, path.suffix, columns):
                yield f"{url}{origin.removeprefix(str(path))}", fields


def _file_rows(path: Path, suffix: str, columns: Columns) -> RowIterator:
    """Turn line numbers into origins and refuse what is no row."""
    try:
        for line, fields in READERS[suffix](path):
            origin = f"{path}:{line}"
            if not isinstance(fields, dict):
                raise ConfigError(
                    f"{origin}: got a {type(fields).__name__}, expected an object with the "
                    "fields of one row"
                )
            fields = columns.rename(fields, origin)
            if suffix == ".csv":
                fields = {key: _cell(key, text, origin) for key, text in fields.items()}
            check_values(fields, origin)
            yield origin, without_filled_nulls(fields) if suffix == ".parquet" else fields
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}:{_undecodable_line(path)}: got bytes that are not UTF-8 ({error.reason}), "
            "expected UTF-8; convert it"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: got {error.strerror}, expected a file that can be read"
        ) from error


def check_values(fields: dict[str, Any], origin: str) -> None:
    """Refuse what no later step could take: halves of characters, and nesting without an end.

    Raises:
      ConfigError: names origin and field.
    """
    # A list of what is left to look at, not recursion: it must not fail on what it looks for.
    left: list[tuple[tuple[Any, ...], Any]] = [((), fields)]
    while left:
        where, value = left.pop()
        if isinstance(value, str):
            _check_text(value, where, origin)
            continue
        if len(where) == DEEPEST:
            raise ConfigError(
                f"{origin} {where[0]}: got values nested more than {DEEPEST} deep, expected fewer "
                "levels; is the file damaged?"
            )
        if isinstance(value, dict):
            left += [((*where, key), key) for key in value if isinstance(key, str)]
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        left += [((*where, key), item) for key, item in inside if isinstance(item, INNER)]


def without_filled_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """Drop the nulls inside a row's values that Arrow put there, not the user.

    A column has one type: each object in it has the keys of all, those that were absent as null.
    Nulls in lists, and the row's own keys, stay.
    """
    return {key: _without_nulls(value) for key, value in fields.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_text(text: str, where: tuple[Any, ...], origin: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        names = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in where)
        shown = names.removeprefix(".").encode("ascii", "backslashreplace").decode()
        raise ConfigError(
            f"{origin} {shown}: got the lone surrogate {text[error.start]!a} as character "
            f"{error.start + 1}, expected text that UTF-8 can hold; it is half of a character: "
            "restore the other half, or remove it"
        ) from error


def _undecodable_line(path: Path) -> int:
    """Find the first line that is not UTF-8."""
    with path.open("rb") as file:
        return next(n for n, line in enumerate(file, 1) if not _is_utf8(line))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _cell(key: str, text: str, origin: str) -> Any:
    """Columns that hold lists (messages, input_ids) are JSON inside the cell."""
    if key not in STRUCTURED:
        return text
    try:
        return parse_json(text, f"{origin} {key}") if text else None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{origin} {key}: got {text[:40]!r}, expected JSON in this column ({error})"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        # Checksums are looked at where the writer left some: else a flipped bit is another token.
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_names(file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=1024):
                for index in range(batch.num_rows):
                    fields = batch.slice(index, 1).to_pylist()[0]
                    number += 1
                    yield number, fields
    except ConfigError:
        raise
    except Exception as error:  # pyarrow raises a dozen unrelated classes for a damaged file
        origin = f"{path}:{number + 1}" if number else f"{path}"
        raise ConfigError(
            f"{origin}: got {_first_line(error)}, expected a Parquet file that can be read; "
            "write or copy it again"
        ) from error


def _check_names(names: list[str], path: Path) -> None:
    """Of two columns with one name a row would hold the last alone."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{path}: got the column {twice} twice, expected it once; rename one of them"
        )


def _text_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}


def _hub_rows(
    name: str, field: str, splits: tuple[str, ...], subset: str | None, columns: Columns
) -> RowIterator:
    import datasets  # 1.5 s to import, and needed for hub datasets alone

    failures = []
    for split in splits:
        try:
            rows = datasets.load_dataset(name, subset, split=split)
        except Exception as error:  # the hub client raises a dozen unrelated classes
            failures.append(f"split {split}: {_first_line(error)}")
            continue
        return _loaded_rows(rows, f"{name}[{f'{subset}, ' if subset else ''}{split}]", columns)
    raise ConfigError(
        f"{field}: got {name}, expected a file that exists, and there is none of that name, or a "
        f"hub dataset, which did not load ({'; '.join(failures)}); check the path, "
        "data.subset, data.split and the network"
    )


def _loaded_rows(rows: Any, name: str, columns: Columns) -> RowIterator:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            fields = columns.rename(dict(row), f"{name}:{number}")
            check_values(fields, f"{name}:{number}")
            yield f"{name}:{number}", without_filled_nulls(fields)
    except ConfigError:
        raise
    except Exception as error:  # decoding a damaged copy in the hub's cache
        raise ConfigError(
            f"{name}:{number + 1}: got {_first_line(error)}, expected a row that can be read; "
            "remove the data set from the hub's cache"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


READERS = {
    ".json": json_file,
    ".jsonl": json_lines,
    ".csv": csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_lines,
}
