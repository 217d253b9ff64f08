# SPDX-License-Identifier: Apache-2.0
"""One message of a row -> a message as chat templates take it, and its loss weight.

In: a message under the names of any of the usual data sets. Out: `role`, `content` (a string, or
None beside calls), `tool_calls`, `tool_call_id` and `name`, the two last as given. Keys that are
empty say nothing; a key that is not known is refused, because what it says would be lost.
Not here: which messages a row has (`formats`), what a template makes of them (`template`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsjax.config.json_file import parse
from dsjax.errors import ConfigError, nearest, printable

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
CALL_ROLE = "function_call"
OPEN, CLOSE = "<think>", "</think>"

_WEIGHTS = ("loss_weight", "weight", "train", "loss")
_FLAGS = ("train", "loss")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")
_CALL_KEYS = ("id", "type", "index")
_PASSED = ("tool_call_id", "name")
_KEYS = ("role", "from", "content", "value", *_WEIGHTS, *_REASONING, *_CALLS, *_PASSED)
_LARGEST = float(np.finfo(np.float32).max)
_FIXES = {
    "mask": "for some it trains a message and for others it leaves it out: write loss_weight 1 or 0"
}


def read_message(turn: Any, where: str) -> tuple[dict[str, Any], float | None]:
    """Normalise a message.

    Args:
      turn: what stands in the row.
      where: the row's origin and the message's place in it, for messages of error.

    Returns:
      The message, and the loss weight that it names, if any.

    Raises:
      ConfigError: a key or a value is not one of a message.
    """
    if not isinstance(turn, dict):
        raise wrong(where, turn, "an object with role and content")
    _check_keys(turn, where)
    name, given = _one_of(turn, ("role", "from"), where)
    if not isinstance(given, str) or given not in ROLES:
        raise wrong(f"{where}.{name}", given, f"one of {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": ROLES[given], "content": None}
    if given == CALL_ROLE:
        name, value = _one_of(turn, ("value", "content"), where)
        message["tool_calls"] = _calls(value, f"{where}.{name}")
    else:
        message |= _calls_of(turn, where)
        message["content"] = _content_of(turn, where, may_be_null="tool_calls" in message)
    if is_given(turn.get("tool_calls")) and given == CALL_ROLE:
        raise wrong(f"{where}.tool_calls", "calls", f"none beside the role {CALL_ROLE}")
    _add_reasoning(message, turn, where)
    message |= {key: string(turn[key], f"{where}.{key}") for key in _PASSED if _has(turn, key)}
    name, weight = _one_of(turn, _WEIGHTS, where)
    if not is_given(weight):
        return message, None
    return message, _weight(weight, f"{where}.{name}", name in _FLAGS)


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return tool definitions, which may stand in the row as JSON text; None if there are none."""
    given = _parsed(value, where)
    if not is_given(given):
        return None
    if not isinstance(given, list):
        raise wrong(where, given, "a list of tool definitions, or the same as JSON text")
    for index, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise wrong(f"{where}[{index}]", tool, "an object that defines a tool")
    return given


def is_given(value: Any) -> bool:
    """Say whether a value says anything: null and empty texts, lists and objects do not."""
    return value is not None and value not in ("", [], {})


def string(value: Any, where: str) -> str:
    """Return a string.

    Raises:
      ConfigError: it is none.
    """
    if not isinstance(value, str):
        raise wrong(where, value, "a string")
    return value


def wrong(where: str, value: Any, expected: str) -> ConfigError:
    """Say what stands somewhere in a row instead of what was expected."""
    shown = value if isinstance(value, str) else repr(value)
    return ConfigError(f"{where}: got {shown[:60]}, expected {expected}")


def _has(turn: dict[str, Any], key: str) -> bool:
    return is_given(turn.get(key))


def _check_keys(turn: dict[str, Any], where: str) -> None:
    """Refuse keys that nobody would read."""
    for key, value in turn.items():
        if key not in _KEYS and is_given(value):
            fix = _FIXES.get(key) or nearest(str(key), _KEYS)
            raise ConfigError(
                f"{where}.{printable(key)}: got a key that is none of a message's, expected only "
                f"those that are ({', '.join(_KEYS)}); {fix}"
            )


def _one_of(turn: dict[str, Any], names: Sequence[str], where: str) -> tuple[str, Any]:
    """Return the one of several names for the same thing that is given, and its value."""
    given = [name for name in names if _has(turn, name)]
    if any(turn[name] != turn[given[0]] for name in given[1:]):
        raise wrong(f"{where}.{given[1]}", turn[given[1]], f"none beside {given[0]}; keep one")
    name = given[0] if given else next((name for name in names if name in turn), names[0])
    return name, turn.get(name)


def _content_of(turn: dict[str, Any], where: str, may_be_null: bool) -> str | None:
    name, content = _one_of(turn, ("content", "value"), where)
    if content is None and may_be_null:
        return None
    return _content(content, f"{where}.{name}")


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, content, "a string or a list of text parts")
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise wrong(where, kind, "a part of type text; no other kind can be trained on")
    text = part.get("value") if part.get("text") is None else part["text"]
    return string(text, f"{where}.text")


def _add_reasoning(message: dict[str, Any], turn: dict[str, Any], where: str) -> None:
    """Put reasoning where R1 writes it: before the answer, between its marks."""
    name, reasoning = _one_of(turn, _REASONING, where)
    if not is_given(reasoning):
        return
    text = string(reasoning, f"{where}.{name}")
    if message["role"] != "assistant":
        raise wrong(f"{where}.{name}", text, f"none beside the role {message['role']}")
    for other, held in ((name, text), ("content", message["content"] or "")):
        if OPEN in held or CLOSE in held:
            raise ConfigError(
                f"{where}.{other}: got {CLOSE if CLOSE in held else OPEN} beside reasoning in a "
                f"key of its own, expected the marks in none; keep the reasoning in `{name}` alone"
            )
    message["content"] = f"{OPEN}\n{text}\n{CLOSE}\n\n{message['content'] or ''}"


def _calls_of(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the calls of a message, the one of OpenAI's `function_call` among them."""
    if _has(turn, "tool_calls") and _has(turn, "function_call"):
        raise wrong(f"{where}.function_call", "a call", "none beside tool_calls; keep one")
    name = next((name for name in _CALLS if _has(turn, name)), None)
    return {} if name is None else {"tool_calls": _calls(turn[name], f"{where}.{name}")}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Read one call or several, which may stand in the row as JSON text."""
    given = _parsed(value, where)
    several = given if isinstance(given, list) else [given]
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(several)]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Read a call, of OpenAI's form or `{"name": ..., "arguments": ...}` alone."""
    if not isinstance(call, dict):
        raise wrong(where, call, 'a call such as {"name": ..., "arguments": {...}}')
    if isinstance(call.get("function"), dict):
        inner, at = call["function"], f"{where}.function"
        outer = {key: value for key, value in call.items() if value is not None}
        _check_parts(call, (*_CALL_KEYS, "function"), where)
        _check_parts(inner, ("name", "arguments"), at)
    else:
        inner, at = call, where
        _check_parts(call, (*_CALL_KEYS, "name", "arguments"), where)
        outer = {key: call[key] for key in _CALL_KEYS if call.get(key) is not None}
    name = inner.get("name")
    if not isinstance(name, str) or not name:
        raise wrong(f"{at}.name", name, "the name of a tool")
    arguments = _arguments(inner.get("arguments"), f"{at}.arguments")
    return {"type": "function", **outer, "function": {"name": name, "arguments": arguments}}


def _arguments(value: Any, where: str) -> str | dict[str, Any]:
    """Return a call's arguments as they are given; none, and `"{}"`, are an empty object.

    Trap: where a template writes them as JSON, the text `{}` would stand whole between quotes.
    """
    if not is_given(value) or isinstance(value, str) and not value.strip():
        return {}
    parsed = value
    if isinstance(value, str):
        try:
            parsed = parse(value.encode("utf-8"))
        except ValueError:
            return value  # whatever the row's author means by it
    if not isinstance(parsed, dict):
        raise wrong(where, value, "an object, or the same as JSON text")
    return value if parsed else {}


def _check_parts(given: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key, value in given.items():
        if key not in known and is_given(value):
            raise ConfigError(
                f"{where}.{printable(key)}: got a key that is none of a call's, expected only "
                f"{', '.join(known)}; {nearest(str(key), known)}"
            )


def _parsed(value: Any, where: str) -> Any:
    """Parse what stands in a row as JSON text; anything else is returned as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse(value.encode("utf-8"))
    except ValueError as error:
        raise wrong(where, value, f"JSON ({error})") from error


def _weight(value: Any, where: str, flag: bool) -> float:
    if not isinstance(value, bool | int | float) or (flag and value not in (0, 1)):
        raise wrong(where, value, "0, 1, false or true" if flag else "a number of at least 0")
    if not 0 <= value <= _LARGEST or (value and not np.float32(value)):
        raise wrong(where, value, "a number of at least 0, within the range of float32")
    return float(value)
