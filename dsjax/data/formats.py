# SPDX-License-Identifier: Apache-2.0
"""One row's fields -> what it means: a conversation, plain text, or tokens.

In: the fields of a row and its origin. Out: `Chat`, `Text` or `Pretokenized`, with a loss weight
for each message or piece. Six formats, told apart by their keys. Keys that would make a row mean
something else are refused; of other keys, `unread_keys` says which are not read. Every complaint
starts with `FILE:LINE field`. Not here: one message by itself (`messages`), templates and
tokenizers (`chat`, `examples`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from dsjax.data.messages import is_given, read_message, read_tools, string, wrong
from dsjax.errors import ConfigError, printable

IGNORED_LABEL = -100
PREFERENCE = "preferences cannot be trained on yet; make rows of the answers to imitate"
MEDIA = "only text can be trained on; take these rows out"
WEIGHTED = "one weight for a whole row is not read; give messages a loss_weight each"
MASKED = "masks are not read; give `labels` with -100 where nothing is trained"
OTHER_MEANING = {
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "kto_tag"), PREFERENCE),
    **dict.fromkeys(("rejected_messages", "rejected_answer", "ranking"), PREFERENCE),
    "label": "classes and judgements cannot be trained on yet; set data.format to text or "
    "prompt_completion to train on the rest of the row and leave it unread",
    "functions": "tool definitions are read from `tools`; rename the key",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), MEDIA),
    **dict.fromkeys(("weight", "loss_weight"), WEIGHTED),
    **dict.fromkeys(("mask", "loss_mask", "completion_mask", "assistant_masks"), MASKED),
}
"""Keys of a row that make it mean something else than its other keys say -> what to do."""
CHOSEN = {"text": ("label",), "prompt_completion": ("label",)}
"""Those that are only not read where the user names the format: which columns matter is said."""
JUDGED = (
    "whether a completion is a good one cannot be trained on yet; make rows of those to imitate, "
    "and leave the key out"
)
"""Of a `label` that is true or false beside a completion, as KTO's rows have it."""


class Chat(NamedTuple):
    """A conversation: messages as a chat template takes them, and the loss weight of each.

    `names` are what messages of error call the messages: the row's own keys.
    """

    messages: list[dict[str, Any]]
    weights: list[float]
    tools: list[Any] | None = None
    names: tuple[str, ...] = ()

    def name(self, index: int) -> str:
        """Return where a message stands in the row."""
        return self.names[index] if self.names else f"messages[{index}]"

    def field(self, index: int, key: str) -> str:
        """Return where a message's key stands in the row; the tools' where `index` is -1."""
        return f"tools{key}" if index < 0 else f"{self.name(index)}.{key}"


class Text(NamedTuple):
    """Plain text in pieces, each with its loss weight; the EOS that follows has the last one."""

    pieces: list[tuple[str, float]]


class Pretokenized(NamedTuple):
    """Tokens used as they are; where a label is -100, nothing is trained."""

    input_ids: Int32[np.ndarray, " T"]
    labels: Int32[np.ndarray, " T"]


Content = Chat | Text | Pretokenized


def detect_format(fields: dict[str, Any], origin: str) -> str:
    """Name the format of a row by its keys; the first match counts."""
    given = {key for key, value in fields.items() if value is not None}
    for name, (keys, _) in FORMATS.items():
        if given.issuperset(keys):
            return name
    _check_meaning(fields, origin)
    for name, (keys, _) in FORMATS.items():
        if fields.keys() >= set(keys):
            _check_nulls(fields, name, origin)
    known = "; ".join(f"{name}: {' + '.join(keys)}" for name, (keys, _) in FORMATS.items())
    raise ConfigError(
        f"{origin}: got the keys {_names(fields)}, expected those of a known "
        f"format ({known}); rename the keys"
    )


def parse_row(fields: dict[str, Any], name: str, origin: str, chosen: bool = False) -> Content:
    """Read a row of a named format, which the user may have `chosen`.

    Raises:
      ConfigError: a key is missing, a value has the wrong type, or a key would make the row mean
        something else; names origin and field.
    """
    if name == "prompt_completion" and str(fields.get("label")).lower() in ("true", "false"):
        raise _other_meaning(origin, "label", JUDGED)
    _check_meaning(fields, origin, CHOSEN.get(name, ()) if chosen else ())
    _check_nulls(fields, name, origin)
    keys, parse = FORMATS[name]
    missing = [key for key in keys if fields.get(key) is None]
    if missing:
        raise ConfigError(
            f"{origin}: got the keys {_names(fields)}, expected also "
            f"{', '.join(missing)} for the format {name}"
        )
    return parse(fields, origin)


def _names(fields: dict[str, Any]) -> str:
    """Write the keys of a row in one line, whatever characters they have."""
    return ", ".join(printable(key) for key in sorted(fields)) or "none"


def unread_keys(fields: dict[str, Any], name: str) -> list[str]:
    """List the keys of a row that say something and that its format does not read."""
    read = (*FORMATS[name][0], *OPTIONAL[name])
    return [key for key, value in fields.items() if key not in read and is_given(value)]


def _check_meaning(fields: dict[str, Any], origin: str, allowed: Sequence[str] = ()) -> None:
    for key, fix in OTHER_MEANING.items():
        if key not in allowed and is_given(fields.get(key)):
            raise _other_meaning(origin, key, fix)


def _other_meaning(origin: str, key: str, fix: str) -> ConfigError:
    return ConfigError(f"{origin} {key}: got {key}, expected a row without it; {fix}")


def _check_nulls(fields: dict[str, Any], name: str, origin: str) -> None:
    """Refuse a row that has a key of its format, and null there."""
    for key in FORMATS[name][0]:
        if key in fields and fields[key] is None:
            raise ConfigError(
                f"{origin} {key}: got null, expected a value, which the format {name} needs; write "
                "one, or take the row out"
            )


def _messages(fields: dict[str, Any], origin: str) -> Chat:
    chat = _chat(fields["messages"], fields, origin, "messages")
    return _with_system(chat, fields, origin)


def _sharegpt(fields: dict[str, Any], origin: str) -> Chat:
    chat = _chat(fields["conversations"], fields, origin, "conversations")
    return _with_system(chat, fields, origin)


def _alpaca(fields: dict[str, Any], origin: str) -> Chat:
    """Instruction and input become one user message, joined by a line break if both are given."""
    turns = []
    history = fields["history"] if is_given(fields.get("history")) else []
    if not isinstance(history, list):
        raise wrong(f"{origin} history", history, "a list of pairs [question, answer]")
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong(f"{origin} history[{index}]", pair, "a pair [question, answer]")
        turns += [
            {"role": role, "content": string(text, f"{origin} history[{index}][{side}]")}
            for side, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True))
        ]
    question = string(fields["instruction"], f"{origin} instruction")
    extra = _optional(fields, "input", origin)
    asked = "\n".join(text for text in (question, extra) if text)
    turns.append({"role": "user", "content": asked})
    answer = string(fields["output"], f"{origin} output")
    turns.append({"role": "assistant", "content": answer})
    names = [f"history[{index}][{side}]" for index in range(len(history)) for side in (0, 1)]
    chat = _chat(turns, fields, origin, "messages")
    chat = chat._replace(names=(*names, "instruction", "output"))
    return _with_system(chat, fields, origin)


def _prompt_completion(fields: dict[str, Any], origin: str) -> Content:
    """Strings are plain text, the completion trained; lists are messages."""
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _chat(prompt, fields, origin, "prompt", trained="") if prompt else Chat([], [])
        after = _chat(completion, fields, origin, "completion")
        chat = Chat(
            before.messages + after.messages,
            before.weights + after.weights,
            after.tools,
            before.names + after.names,
        )
        return _with_system(chat, fields, origin)
    _check_plain(fields, origin)
    text = string(prompt, f"{origin} prompt")
    return Text([(text, 0.0), (string(completion, f"{origin} completion"), 1.0)])


def _text(fields: dict[str, Any], origin: str) -> Text:
    _check_plain(fields, origin)
    return Text([(string(fields["text"], f"{origin} text"), 1.0)])


def _tokens(fields: dict[str, Any], origin: str) -> Pretokenized:
    ids = _integers(fields["input_ids"], f"{origin} input_ids")
    if not len(ids):
        raise wrong(f"{origin} input_ids", "[]", "at least one token")
    if fields.get("attention_mask") is not None:
        mask = _integers(fields["attention_mask"], f"{origin} attention_mask")
        if len(mask) != len(ids):
            what = f"{origin} attention_mask"
            raise wrong(what, f"{len(mask)} values", f"{len(ids)} as in input_ids")
        if not mask.all():
            raise wrong(f"{origin} attention_mask", "zeros", "rows without padding; cut it off")
    if fields.get("labels") is None:
        return Pretokenized(ids, ids)
    labels = _integers(fields["labels"], f"{origin} labels")
    if len(labels) != len(ids):
        raise wrong(f"{origin} labels", f"{len(labels)} values", f"{len(ids)} as in input_ids")
    return Pretokenized(ids, labels)


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], str], Content]]] = {
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "tokens": (("input_ids",), _tokens),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "text": (("text",), _text),
}
OPTIONAL = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "tokens": ("labels", "attention_mask"),
    "prompt_completion": ("system", "tools"),
    "alpaca": ("input", "history", "system", "tools"),
    "text": (),
}
"""The keys that a row of each format may have besides."""


def _chat(
    turns: Any, fields: dict[str, Any], origin: str, key: str, trained: str = "assistant"
) -> Chat:
    """Normalise the messages under a key; `trained` is the role whose usual loss weight is 1."""
    if not isinstance(turns, list) or not turns:
        raise wrong(f"{origin} {key}", turns, "a list of messages")
    messages, weights = [], []
    for index, turn in enumerate(turns):
        message, weight = read_message(turn, f"{origin} {key}[{index}]")
        usual = 1.0 if message["role"] == trained else 0.0
        messages.append(message)
        weights.append(usual if weight is None else weight)
    tools = read_tools(fields.get("tools"), f"{origin} tools")
    names = tuple(f"{key}[{index}]" for index in range(len(turns)))
    return Chat(messages, weights, tools, names)


def _check_plain(fields: dict[str, Any], origin: str) -> None:
    """Refuse what only a conversation can show, beside plain text."""
    for key in ("system", "tools"):
        if is_given(fields.get(key)):
            raise wrong(f"{origin} {key}", fields[key], "none beside plain text; write it into it")


def _with_system(chat: Chat, fields: dict[str, Any], origin: str) -> Chat:
    system, opening = _optional(fields, "system", origin), chat.messages[0]
    if not system or opening == {"role": "system", "content": system}:
        return chat
    if opening["role"] == "system":
        raise wrong(f"{origin} system", system, "one system text, not also a system message")
    first = {"role": "system", "content": system}
    names = ("system", *chat.names)
    return Chat([first, *chat.messages], [0.0, *chat.weights], chat.tools, names)


def _optional(fields: dict[str, Any], key: str, origin: str) -> str:
    """Return a text that need not be there."""
    return string(fields[key], f"{origin} {key}") if is_given(fields.get(key)) else ""


def _integers(values: Any, where: str) -> Int32[np.ndarray, " T"]:
    if not isinstance(values, list):
        raise wrong(where, values, "a list of token ids")
    for index, value in enumerate(values):
        if type(value) is not int or not -(2**31) <= value < 2**31:
            raise wrong(f"{where}[{index}]", value, "an integer token id")
    return np.array(values, np.int32)
