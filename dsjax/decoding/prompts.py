# SPDX-License-Identifier: Apache-2.0
"""Prompts as a user has them: texts, conversations, or tokens.

In: one of these, or a list of one kind. Out: the tokens of each, and whether the answers are wanted
as text. Not done here: the tokens that follow (`decode`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from dsjax.data import encode_chat, encode_text
from dsjax.errors import ConfigError

KINDS = (
    "a text, a conversation (messages with role and content), token ids, or a list of one of these"
)


class Prompts(NamedTuple):
    """What is to be continued.

    Attributes:
        input_ids: the tokens of each.
        as_text: whether they came as text or conversations, and so are answered.
        one: whether there was no list around it.
    """

    input_ids: list[list[int]]
    as_text: bool
    one: bool


def read_prompts(prompts: Any, tokenizer: Callable[[], PreTrainedTokenizerFast]) -> Prompts:
    """Tokenise prompts.

    Args:
        prompts: a text; a conversation, as a list of messages; token ids, as a list or an array;
            or a list (for ids, an array [B, T] as well) of several of one of these.
        tokenizer: gives the checkpoint's, which ids do not need.

    Raises:
        ConfigError: something else, several kinds in one list, or a chat template is missing.
    """
    if isinstance(prompts, str):
        return Prompts([encode_text(tokenizer(), prompts)], True, True)
    items = prompts if isinstance(prompts, (list, tuple)) else _rows(prompts)
    kinds = {_kind(item) for item in items}
    if kinds == {"message"}:
        return Prompts([encode_chat(tokenizer(), list(items))], True, True)
    if kinds == {"id"}:
        return Prompts([[int(token) for token in items]], False, True)
    if kinds == {"text"}:
        return Prompts([encode_text(tokenizer(), text) for text in items], True, False)
    if kinds == {"conversation"}:
        return Prompts([encode_chat(tokenizer(), list(chat)) for chat in items], True, False)
    if kinds <= {"ids"}:
        rows = [[int(token) for token in _rows(row)] for row in items]
        return Prompts(rows, False, False)
    raise ConfigError(f"prompts: got {_shown(items)}, expected {KINDS}")


def _rows(values: Any) -> Sequence[Any]:
    """List what an array of numpy, torch or jax holds."""
    if isinstance(values, (list, tuple)):
        return values
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # torch's, of a tensor that needs a gradient
        array = np.empty((), object)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
        raise ConfigError(f"prompts: got a {type(values).__name__}, expected {KINDS}")
    return array.tolist()


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return "text"
    if isinstance(item, Mapping):
        return "message"
    if isinstance(item, (int, np.integer)) and not isinstance(item, bool):
        return "id"
    if isinstance(item, (list, tuple)) and item and all(isinstance(m, Mapping) for m in item):
        return "conversation"
    if isinstance(item, (list, tuple)) or hasattr(item, "__array__"):
        inner = {_kind(value) for value in _rows(item)}
        return "ids" if inner <= {"id"} else "something else"
    return "something else"


def _shown(items: Sequence[Any]) -> str:
    return "a list of " + " and ".join(sorted({type(item).__name__ for item in items}))
