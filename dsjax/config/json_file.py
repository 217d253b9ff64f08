# SPDX-License-Identifier: Apache-2.0
"""JSON objects as they come from disk: of a checkpoint, an adapter, or an earlier run of ours.

In: a file, or its bytes. Out: a dictionary that can be walked, written and shown without surprise,
or a `ConfigError` that names the file. Not done here: what its keys mean; rows of data
(`data.files`), which are told by their lines.
"""

import json
from typing import Any, Protocol, runtime_checkable

from dsjax.errors import ConfigError

MOST_LEVELS = 100
"""Objects and lists inside one another; the files that are read here have fewer than ten."""


@runtime_checkable
class Readable(Protocol):
    """A file on this machine, or one behind a URL."""

    def read_bytes(self) -> bytes:
        """Return the whole of it."""
        ...


def read_object(file: Readable, field: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        file: the file.
        field: what the message of an error begins with, such as `model.path`.

    Raises:
        ConfigError: it holds something else.
    """
    return parse_object(file.read_bytes(), file, field)


def parse_object(content: bytes, file: object, field: str) -> dict[str, Any]:
    """Parse the content of a file that `read_object` would read.

    Raises:
        ConfigError: it is no JSON object.
    """
    try:
        value = parse(content)
    except ValueError as error:
        raise ConfigError(
            f"{field}: got invalid JSON in {file} ({error}), expected a JSON object; correct it, "
            "or fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{field}: got a JSON {type(value).__name__} in {file}, expected a JSON object; "
            "correct it, or fetch it again"
        )
    return value


def parse(content: bytes) -> Any:
    """Parse JSON that later code may recurse into and write again.

    Raises:
        ValueError: it is no JSON in UTF-8, is nested too deeply, or holds half a character.
    """
    text = content.decode("utf-8")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MOST_LEVELS} levels") from None
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [child for item in level for child in _children(item)]
    if level:
        raise ValueError(f"nested deeper than {MOST_LEVELS} levels")
    if "\\u" in text:  # an escaped surrogate without its other half cannot be written again
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _children(item: Any) -> Any:
    """Return the values inside an object or a list."""
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()
