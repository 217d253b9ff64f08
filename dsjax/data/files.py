# SPDX-License-Identifier: Apache-2.0
"""Sources -> rows, each with the place it came from.

In: a path or the id of a hub dataset. Out: `(origin, fields)` pairs, one at a time; origin is
`FILE:LINE` (for Parquet and the hub the number of the row, from 1), which every later complaint
about the row repeats. Local files are parsed here, not by `datasets`: its readers infer one type
per column, so they fail on rows of mixed shape and cannot say which line is wrong.
Plain text (.txt) is one row per non-empty line. Not here: what the fields mean (`formats`).
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from dsjax.errors import ConfigError, nearest
from dsjax.storage import is_url

Rows = Iterator[tuple[str, dict[str, Any]]]

CHUNK = 1 << 20
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
VISIBLE = re.compile(r"\S")
STRUCTURED = ("messages", "conversations", "history", "input_ids", "labels")


def read_rows(source: str, field: str, splits: tuple[str, ...]) -> Rows:
    """Yield the rows of one file or hub dataset.

    Args:
      source: path, or hub id.
      field: config path of the source, for messages (`data.train[0]`).
      splits: splits of a hub dataset to try, in order.

    Raises:
      ConfigError: nothing there, a folder, an unknown kind of file, or a row that does not parse.
    """
    if is_url(source):
        raise ConfigError(
            f"{field}: got the URL {source}, expected a file or a hub dataset; copy it to a file "
            "system that every host sees"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        raise ConfigError(
            f"{field}: got the folder {source}, expected a file or a hub dataset; list its files, "
            f"such as {next(_data_files(path), path / 'train.jsonl')}"
        )
    if path.is_file():
        return _checked(READERS[_suffix(path, field)](path), path)
    if path.suffix in READERS or not HUB_ID.fullmatch(source):
        raise ConfigError(f"{field}: got {source}, expected a file that exists{_beside(path)}")
    return _hub_rows(source, field, splits)


def _data_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix in READERS)


def _beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    names = [found.name for found in _data_files(path.parent)]
    return f"; {nearest(path.name, names)}" if names else ""


def _suffix(path: Path, field: str) -> str:
    if path.suffix not in READERS:
        raise ConfigError(
            f"{field}: got {path}, expected a file that ends in {', '.join(READERS)}; "
            "rename it, or unpack it if it is compressed"
        )
    return path.suffix


def _checked(rows: Iterator[tuple[int, Any]], path: Path) -> Rows:
    """Turn line numbers into origins and refuse what is no row."""
    try:
        for line, fields in rows:
            if not isinstance(fields, dict):
                raise ConfigError(
                    f"{path}:{line}: got a {type(fields).__name__}, expected an object with the "
                    "fields of one row"
                )
            yield f"{path}:{line}", fields
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: got bytes that are not UTF-8 ({error.reason}), expected UTF-8; convert it"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: got {error.strerror}, expected a file that can be read"
        ) from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_line(line, path, number)


def _json_line(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # bad JSON, or bytes that are not UTF-8
        raise ConfigError(
            f"{path}:{number}: got a line that is not JSON ({error}), expected one object per line"
        ) from error


class _JSONText:
    """A JSON file read piece by piece, so that a large array is never in memory as a whole."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.line = path, 1
        self._file = file
        self._text, self._at, self._ended = "", 0, False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Skip white space and return the next character, "" at the end of the file."""
        while True:
            found = VISIBLE.search(self._text, self._at)
            self._skip((found.start() if found else len(self._text)) - self._at)
            if found:
                return found.group()
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Pass over one expected character."""
        if self.peek() != character:
            raise self.wrong(repr(character))
        self._skip(1)

    def value(self) -> Any:
        """Parse the next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # A value cut by the end of the piece in memory fails near that end.
                cut = "Unterminated" in error.msg or error.pos > len(self._text) - 16
                if cut and self._more():
                    continue
                self._skip(max(error.pos - self._at, 0))
                raise self.wrong(f"JSON ({error.msg})") from error
            if end == len(self._text) and self._more():
                continue  # a number could go on in the next piece
            self._skip(end - self._at)
            return value

    def enter_list(self, key: str) -> None:
        """Pass over `{` and the members before `key`, and enter its list."""
        self.take("{")
        while self.peek() == '"':
            found = self.value()
            self.take(":")
            if found == key:
                return self.take("[")
            self.value()
            if self.peek() == ",":
                self.take(",")
        raise self.wrong(f'an array of rows, or an object with "{key}": [rows]')

    def wrong(self, expected: str) -> ConfigError:
        """Say what stands here instead of what was expected."""
        found = self._text[self._at : self._at + 20].split("\n")[0]
        return ConfigError(
            f"{self.path}:{self.line}: got {found!r}, expected {expected}"
            if found
            else f"{self.path}:{self.line}: got the end of the file, expected {expected}"
        )

    def _skip(self, count: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def _more(self) -> bool:
        """Read on; pieces double while one value does not fit, so a long value costs no more."""
        rest = self._text[self._at :]
        piece = self._file.read(max(CHUNK, len(rest)))
        if not piece:
            return False
        self._text, self._at = rest + piece, 0
        return True


def _json_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Read an array of rows, or `{"data": [rows]}`, or rows one per line under the name .json."""
    with path.open(encoding="utf-8-sig") as file:
        text = _JSONText(path, file)
        if text.peek() == "{" and _first_line_is_whole(path):
            yield from _json_lines(path)
        else:
            yield from _json_array(text)


def _json_array(text: _JSONText) -> Iterator[tuple[int, Any]]:
    start = text.peek()
    if start == "{":
        text.enter_list("data")
    elif start == "[":
        text.take("[")
    else:
        raise text.wrong('an array of rows, or {"data": [rows]}')
    while text.peek() != "]":
        line = text.line
        yield line, text.value()
        if text.peek() != "]":
            text.take(",")
    text.take("]")
    if start == "[" and text.peek():
        raise text.wrong("the end of the file after the array")


def _first_line_is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        line = next((line for line in file if line.strip()), b"")
    try:
        return "data" not in json.loads(line)
    except ValueError:
        return False


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 131072 characters
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", strict=True)
        line = 2
        try:
            for fields in reader:
                _check_columns(fields, reader.fieldnames or (), f"{path}:{line}")
                yield line, {key: _cell(key, text, path, line) for key, text in fields.items()}
                line = reader.line_num + 1
        except csv.Error as error:
            raise ConfigError(
                f"{path}:{line}: got a row that is not CSV ({error}), expected CSV with a header; "
                "double the quotes inside quoted cells"
            ) from error


def _check_columns(fields: dict, names: Any, origin: str) -> None:
    if "" in fields or None in fields.values():
        found = len(names) - list(fields.values()).count(None) + len(fields.get("", ()))
        raise ConfigError(
            f"{origin}: got {found} columns, expected {len(names)} as in the header; "
            "quote cells that hold a comma or a line break"
        )


def _cell(key: str, text: str, path: Path, line: int) -> Any:
    """Columns that hold lists (messages, input_ids) are JSON inside the cell."""
    if key not in STRUCTURED:
        return text
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise ConfigError(
            f"{path}:{line} {key}: got {text[:40]!r}, expected JSON in this column ({error})"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path}: got {error}, expected a Parquet file") from error


def _text_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}


def _hub_rows(name: str, field: str, splits: tuple[str, ...]) -> Rows:
    import datasets  # 1.5 s to import, and needed for hub datasets alone

    failures = []
    for split in splits:
        try:
            rows = datasets.load_dataset(name, split=split)
        except Exception as error:  # the hub client raises a dozen unrelated classes
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            failures.append(f"split {split}: {reason[:200]}")
            continue
        return ((f"{name}[{split}]:{number}", dict(row)) for number, row in enumerate(rows, 1))
    raise ConfigError(
        f"{field}: got {name}, expected a file that exists, and there is none of that name, or a "
        f"hub dataset, which did not load ({'; '.join(failures)}); check the path, data.split and "
        "the network"
    )


READERS = {
    ".json": _json_file,
    ".jsonl": _json_lines,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_lines,
}
