# SPDX-License-Identifier: Apache-2.0
"""One row's fields -> what it means: a conversation, plain text, or tokens.

In: the fields of a row and its origin. Out: `Chat`, `Text` or `Tokens`, with a loss weight for each
message or piece. Six formats, told apart by their keys; other keys of a row are not read.
Every complaint starts with `FILE:LINE field`. Not here: templates and tokenizers (`chat`,
`examples`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from dsjax.errors import ConfigError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
IGNORED_LABEL = -100


class Chat(NamedTuple):
    """A conversation: messages as a chat template takes them, and the loss weight of each."""

    messages: list[dict[str, Any]]
    weights: list[float]
    tools: list[Any] | None = None


class Text(NamedTuple):
    """Plain text in pieces, each with its loss weight; the EOS that follows has the last one."""

    pieces: list[tuple[str, float]]


class Tokens(NamedTuple):
    """Tokens used as they are; where a label is -100, nothing is trained."""

    input_ids: Int32[np.ndarray, " T"]
    labels: Int32[np.ndarray, " T"]


Content = Chat | Text | Tokens


def detect_format(fields: dict[str, Any], origin: str) -> str:
    """Name the format of a row by its keys; the first match counts."""
    given = {key for key, value in fields.items() if value is not None}
    for name, (keys, _) in FORMATS.items():
        if given.issuperset(keys):
            return name
    known = "; ".join(f"{name}: {' + '.join(keys)}" for name, (keys, _) in FORMATS.items())
    raise ConfigError(
        f"{origin}: got the keys {', '.join(sorted(fields)) or 'none'}, expected those of a known "
        f"format ({known}); rename the keys"
    )


def parse_row(fields: dict[str, Any], name: str, origin: str) -> Content:
    """Read a row of a named format.

    Raises:
      ConfigError: a key is missing, or a value has the wrong type; names origin and field.
    """
    keys, parse = FORMATS[name]
    missing = [key for key in keys if fields.get(key) is None]
    if missing:
        raise ConfigError(
            f"{origin}: got the keys {', '.join(sorted(fields)) or 'none'}, expected also "
            f"{', '.join(missing)} for the format {name}"
        )
    return parse(fields, origin)


def _messages(fields: dict[str, Any], origin: str) -> Chat:
    return _chat(fields["messages"], fields, f"{origin} messages")


def _sharegpt(fields: dict[str, Any], origin: str) -> Chat:
    chat = _chat(fields["conversations"], fields, f"{origin} conversations")
    return _with_system(chat, fields, origin)


def _alpaca(fields: dict[str, Any], origin: str) -> Chat:
    """Instruction and input become one user message, joined by a line break."""
    turns = []
    for index, pair in enumerate(fields.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _wrong(f"{origin} history[{index}]", pair, "a pair [question, answer]")
        turns += [
            {"role": role, "content": _string(text, f"{origin} history[{index}][{side}]")}
            for side, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True))
        ]
    question = _string(fields["instruction"], f"{origin} instruction")
    extra = _string(fields.get("input") or "", f"{origin} input")
    turns.append({"role": "user", "content": f"{question}\n{extra}" if extra else question})
    answer = _string(fields["output"], f"{origin} output")
    turns.append({"role": "assistant", "content": answer})
    return _with_system(_chat(turns, fields, origin), fields, origin)


def _prompt_completion(fields: dict[str, Any], origin: str) -> Content:
    """Strings are plain text, the completion trained; lists are messages."""
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _chat(prompt, fields, f"{origin} prompt", trained="")
        after = _chat(completion, fields, f"{origin} completion")
        return Chat(before.messages + after.messages, before.weights + after.weights, before.tools)
    text = _string(prompt, f"{origin} prompt")
    return Text([(text, 0.0), (_string(completion, f"{origin} completion"), 1.0)])


def _text(fields: dict[str, Any], origin: str) -> Text:
    return Text([(_string(fields["text"], f"{origin} text"), 1.0)])


def _tokens(fields: dict[str, Any], origin: str) -> Tokens:
    ids = _integers(fields["input_ids"], f"{origin} input_ids")
    if not len(ids):
        raise _wrong(f"{origin} input_ids", "[]", "at least one token")
    if fields.get("attention_mask") is not None:
        mask = _integers(fields["attention_mask"], f"{origin} attention_mask")
        if len(mask) != len(ids):
            what = f"{origin} attention_mask"
            raise _wrong(what, f"{len(mask)} values", f"{len(ids)} as in input_ids")
        if not mask.all():
            raise _wrong(f"{origin} attention_mask", "zeros", "rows without padding; cut it off")
    if fields.get("labels") is None:
        return Tokens(ids, ids)
    labels = _integers(fields["labels"], f"{origin} labels")
    if len(labels) != len(ids):
        raise _wrong(f"{origin} labels", f"{len(labels)} values", f"{len(ids)} as in input_ids")
    return Tokens(ids, labels)


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], str], Content]]] = {
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "tokens": (("input_ids",), _tokens),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "text": (("text",), _text),
}


def _chat(turns: Any, fields: dict[str, Any], where: str, trained: str = "assistant") -> Chat:
    """Normalise messages; `trained` is the role whose usual loss weight is 1."""
    if not isinstance(turns, list) or not turns:
        raise _wrong(where, turns, "a list of messages")
    messages, weights = [], []
    for index, turn in enumerate(turns):
        message = _message(turn, f"{where}[{index}]")
        given = message.pop("loss_weight", None)
        usual = 1.0 if message["role"] == trained else 0.0
        messages.append(message)
        weights.append(usual if given is None else _weight(given, f"{where}[{index}]"))
    return Chat(messages, weights, fields.get("tools") or None)


def _message(turn: Any, where: str) -> dict[str, Any]:
    """Return a message with `role` and `content` as a string, and its other keys as they are."""
    if not isinstance(turn, dict):
        raise _wrong(where, turn, "an object with role and content")
    # Arrow gives every key of any row to all rows, as None.
    message = {key: value for key, value in turn.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if role not in ROLES:
        raise _wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    key = "value" if "value" in message else "content"
    content = message.pop(key, None)
    if content is None and not message.get("tool_calls"):
        raise _wrong(f"{where}.content", content, "a string or a list of text parts")
    text = "" if content is None else _content(content, f"{where}.{key}")
    reasoning = message.pop("reasoning_content", None)
    if reasoning:
        text = f"<think>\n{_string(reasoning, f'{where}.reasoning_content')}\n</think>\n\n{text}"
    return {"role": ROLES[role], "content": text, **message}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(where, content, "a string or a list of text parts")
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise _wrong(where, kind, "a part of type text; no other kind can be trained on")
    text = part.get("value") if part.get("text") is None else part["text"]
    return _string(text, f"{where}.text")


def _with_system(chat: Chat, fields: dict[str, Any], origin: str) -> Chat:
    system = _string(fields.get("system") or "", f"{origin} system")
    if not system:
        return chat
    if chat.messages[0]["role"] == "system":
        raise _wrong(f"{origin} system", system, "one system text, not also a system message")
    first = {"role": "system", "content": system}
    return Chat([first, *chat.messages], [0.0, *chat.weights], chat.tools)


def _weight(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise _wrong(f"{where}.loss_weight", value, "a number of at least 0")
    return float(value)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, value, "a string")
    return value


def _integers(values: Any, where: str) -> Int32[np.ndarray, " T"]:
    if not isinstance(values, list):
        raise _wrong(where, values, "a list of token ids")
    for index, value in enumerate(values):
        if type(value) is not int or not -(2**31) <= value < 2**31:
            raise _wrong(f"{where}[{index}]", value, "an integer token id")
    return np.array(values, np.int32)


def _wrong(where: str, value: Any, expected: str) -> ConfigError:
    shown = value if isinstance(value, str) else repr(value)
    return ConfigError(f"{where}: got {shown[:60]}, expected {expected}")
