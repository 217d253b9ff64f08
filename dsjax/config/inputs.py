# SPDX-License-Identifier: Apache-2.0
"""Whether the inputs that a configuration names can be there, by their names alone.

In: `model.path`, `adapter.path`, `data.train`, `data.eval`, a run. Out: `ConfigError` where the
file system shows that one is nothing to read. It takes no time, so that commands ask before
they import; who reads an input asks again. Not done here: reading one (`data.files`, `weights`).
"""

import glob
import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from dsjax.config.load import RunConfig
from dsjax.config.paths import FLAX_MANIFEST, RUN_CONFIG, is_url
from dsjax.errors import ConfigError, nearest, raise_all

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_PATTERN = re.compile(r"[*?\[]")

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def check_inputs(config: RunConfig, *, training: bool = True) -> None:
    """Refuse a configuration whose model or data is not there.

    Args:
        config: of a run.
        training: False where nothing is read but what is evaluated on.

    Raises:
        ConfigError: names each of them.
    """
    data = config.data
    if training:
        sources = {"data.train": data.train, "data.eval": data.eval or []}
    else:
        sources = {"data.eval": data.eval or []} if data.eval else {"data.train": data.train}
    check_named(config.model.path, config.adapter.path, sources)


def check_named(
    model: str,
    adapter: str | None,
    sources: Mapping[str, Sequence[str]],
    fields: tuple[str, str] = ("model.path", "adapter.path"),
) -> None:
    """Refuse inputs that are not there.

    Args:
        model: a checkpoint.
        adapter: a PEFT adapter, if any.
        sources: of rows, by the name of their list.
        fields: what messages call the model and the adapter.

    Raises:
        ConfigError: names each of them.
    """
    checks = [(check_model_path, model, fields[0])]
    checks += [(check_adapter_path, adapter, fields[1])] if adapter is not None else []
    checks += [
        (_check_sources, source, f"{name}[{index}]")
        for name, named in sources.items()
        for index, source in enumerate(named)
    ]
    raise_all(_problems(checks))


def _problems(checks: Sequence[tuple[Callable[[str, str], None], str, str]]) -> Iterator[str]:
    for check, path, field in checks:
        try:
            check(path, field)
        except ConfigError as error:
            yield str(error)


def may_download(path: str) -> bool:
    """Whether reading a model may begin with a download, which shows bars of its own."""
    return not (is_url(path) or Path(path).expanduser().is_dir())


def check_run_dir(path: str | Path, field: str, place: str | None = None) -> None:
    """Refuse a folder that is no run's.

    Args:
        path: the folder; what lies behind a URL is not looked at.
        field: what the message begins with.
        place: what it calls the folder, if that is another.

    Raises:
        ConfigError: it holds no resolved configuration.
    """
    place = place or str(path)
    if not is_url(str(path)) and not (Path(path) / RUN_CONFIG).is_file():
        raise ConfigError(
            f"{field}: got {place!r}, expected the output_dir of a run; no "
            f"{os.path.join(place, RUN_CONFIG)}"
        )


def check_flax_checkpoint(path: str, field: str) -> None:
    """Refuse a folder that `convert to-flax` did not write.

    Raises:
        ConfigError: it did not, or there is none.
    """
    if not (Path(path).expanduser() / FLAX_MANIFEST).is_file():
        raise ConfigError(f"{field}: got {path!r}, expected a directory written by to-flax")


def check_model_path(path: str, field: str = "model.path") -> None:
    """Refuse what is no URL, no directory, and no id of a repository on the hub.

    Raises:
        ConfigError: it is none of them.
    """
    local = Path(path).expanduser()
    if is_url(path) or local.is_dir():
        return
    if local.exists():
        raise ConfigError(
            f"{field}: got the file {path!r}, expected the directory that holds config.json; "
            f"give {str(local.parent)!r}"
        )
    if not _MODEL_ID.fullmatch(path):
        raise ConfigError(
            f"{field}: got {path!r}, expected a directory or a hub id; there is no such "
            "directory and a hub id has the form organization/name"
        )


def check_adapter_path(path: str, field: str = "adapter.path") -> None:
    """Refuse what is no URL and no directory.

    Raises:
        ConfigError: it is neither.
    """
    if not is_url(path) and not Path(path).is_dir():
        raise ConfigError(f"{field}: got {path!r}, expected a PEFT adapter's folder")


def _check_sources(source: str, field: str) -> None:
    for found in find_sources(source, field):
        check_source(found, field)


def find_sources(source: str, field: str) -> list[str]:
    """Name the files that a pattern matches, sorted; anything else is one source as it is.

    So is a pattern of URLs, which `data.sources` resolves.

    Raises:
        ConfigError: a pattern matches no file.
    """
    path = os.path.expanduser(source)
    if is_url(source) or not is_pattern(source) or os.path.exists(path):
        return [source]
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise ConfigError(
            f"{field}: got {source}, which matches no file, expected one or more; * and ? stand "
            "for part of a name, ** for folders in folders"
        )
    return found


def is_pattern(source: str) -> bool:
    """Whether a source has characters that stand for several."""
    return _PATTERN.search(source) is not None


def check_source(source: str, field: str) -> None:
    """Refuse what is neither a file of rows nor the id of a dataset on the hub.

    Args:
        source: path, URL, or hub id.
        field: config path of the source, for messages (`data.train[0]`).

    Raises:
        ConfigError: nothing there, a folder, or an unknown kind of file. Whether anything lies
            behind a URL is not asked.
    """
    if is_url(source):
        _check_suffix(source, field)
        return
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            raise ConfigError(
                f"{field}: got the folder {source}, expected a file or a hub dataset; list its "
                f"files, such as {next(_data_files(path), path / 'train.jsonl')}"
            )
        if path.is_file():
            _check_suffix(path, field)
        elif not is_dataset_id(source):
            raise ConfigError(f"{field}: got {source}, expected a file that exists{_beside(path)}")
    except OSError as error:  # a folder on the way that may not be read, a name that is too long
        raise ConfigError(
            f"{field}: got {source}, expected a file that can be read ({error.strerror})"
        ) from error


def is_dataset_id(source: str) -> bool:
    """Whether a source that is no file names a dataset on the hub."""
    if is_url(source):
        return False
    path = Path(source).expanduser()
    known = path.suffix in DATA_SUFFIXES
    return not known and bool(_DATASET_ID.fullmatch(source)) and not path.exists()


def _check_suffix(path: str | Path, field: str) -> None:
    if PurePath(path).suffix not in DATA_SUFFIXES:
        raise ConfigError(
            f"{field}: got {path}, expected a file that ends in {', '.join(DATA_SUFFIXES)}; "
            "rename it, or unpack it if it is compressed"
        )


def _data_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix in DATA_SUFFIXES)


def _beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    names = [found.name for found in _data_files(path.parent)]
    return f"; {nearest(path.name, names)}" if names else ""
