# SPDX-License-Identifier: Apache-2.0
"""JSON files -> values, each with the number of its line.

In: a path. Out: `(line, value)` pairs, one at a time: of one value per line, or of the elements of
an array, which is never in memory as a whole. What cannot be read is refused by its line, whatever
makes it so: syntax, encoding, nesting, length of an integer. Not here: what a row is (`files`).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dsjax.errors import ConfigError

CHUNK = 1 << 20
VISIBLE = re.compile(r"\S")


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Read one value per line; empty lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_line(line, f"{path}:{number}")


def json_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Read an array of rows, or `{"data": [rows]}`, or rows one per line under the name .json."""
    with path.open(encoding="utf-8-sig") as file:
        text = _JSONText(path, file)
        if text.peek() == "{" and _first_line_is_whole(path):
            yield from json_lines(path)
        else:
            yield from _json_array(text)


def _json_line(line: bytes, origin: str) -> Any:
    try:
        return parse_json(line, origin)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{origin}: got a line that is not JSON ({error}), expected one object per line"
        ) from error


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse one value that stands at `where`.

    Raises:
      json.JSONDecodeError, UnicodeDecodeError: it is no JSON.
      ConfigError: it is, but nested too deep, or with an integer of too many digits.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {_beyond_limits(error)}") from error


def _beyond_limits(error: Exception) -> str:
    """Say of right JSON why Python does not read it."""
    if isinstance(error, RecursionError):
        return "got values nested too deep to be read, expected a row; is the file damaged?"
    # Python's advice after the semicolon is for programmers.
    return f"got an integer of too many digits ({str(error).split(';')[0]}), expected a smaller one"


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
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{self.path}:{self.line}: {_beyond_limits(error)}") from error
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
        return not isinstance(json.loads(line).get("data"), list)
    except (ValueError, RecursionError):
        return False  # the reader of arrays says what is wrong
