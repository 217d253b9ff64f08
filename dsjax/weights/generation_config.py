# SPDX-License-Identifier: Apache-2.0
"""Where generation stops, as a checkpoint's files say it, and as its chat template shows.

In: an opened checkpoint, its tokenizer. Out: the tokens that end an answer; for an export, a
generation_config.json that names the token with which the chat template ends turns, where the
checkpoint's own does not: trained on that, a model would never stop.
Not here: generating (`decoding`), the template (`data.template`).
"""

import json
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from dsjax.config.json_file import read_object
from dsjax.data import find_tokenizer, turn_ending
from dsjax.errors import ConfigError
from dsjax.models.config_checks import shown
from dsjax.weights.source import Source

FILE = "generation_config.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


class AddedStop(NamedTuple):
    """A token that the checkpoint's files do not stop at though its chat template ends turns so."""

    token: int
    text: str
    all_tokens: list[int]


def stop_tokens(source: Source, tokenizer: PreTrainedTokenizerFast | None) -> frozenset[int]:
    """Return the tokens that end an answer: those that the files name, and the chat template's.

    Without a tokenizer they are what config.json and generation_config.json name.

    Raises:
        ConfigError: generation_config.json is no such file.
    """
    added = _added_stop(source, tokenizer)
    return frozenset(_named_stops(source, tokenizer) if added is None else added.all_tokens)


def added_stop(source: Source) -> AddedStop | None:
    """Find what an export has to add; None where nothing is missing, or cannot be known."""
    try:
        return _added_stop(source, find_tokenizer(source.directory, "auto"))
    except ConfigError:  # files that the run did not need; an export does not fail by them
        return None


def write_generation_config(directory: Path, source: Source) -> None:
    """Name the chat template's ending in a merged export's generation_config.json, if needed."""
    added = added_stop(source)
    if added is None:
        return
    file = directory / FILE
    if file.is_file():
        content = read_object(file, "model.path")
    else:  # transformers would take these from config.json
        content = {key: source.config[key] for key in _SPECIAL if key in source.config}
    content["eos_token_id"] = added.all_tokens
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _added_stop(source: Source, tokenizer: PreTrainedTokenizerFast | None) -> AddedStop | None:
    if tokenizer is None:
        return None
    ending, named = turn_ending(tokenizer), _named_stops(source, tokenizer)
    if ending is None or ending.token is None or ending.token in named:
        return None
    text = str(tokenizer.convert_ids_to_tokens(ending.token))
    return AddedStop(ending.token, text, [*named, ending.token])


def _named_stops(source: Source, tokenizer: PreTrainedTokenizerFast | None) -> list[int]:
    """Read the tokens of the first with any: generation_config.json, config.json, tokenizer."""
    file = source.directory / FILE
    settings = read_object(file, "model.path") if file.is_file() else {}
    named = [
        (file, settings.get("eos_token_id")),
        (source.directory / "config.json", source.config.get("eos_token_id")),
        ("the tokenizer", None if tokenizer is None else tokenizer.eos_token_id),
    ]
    place, found = next(((p, ids) for p, ids in named if ids not in (None, [])), ("", []))
    ids = found if isinstance(found, list) else [found]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ConfigError(
            f"{place} eos_token_id: got {shown(found)}, expected an integer >= 0 or a list of them"
        )
    return list(dict.fromkeys(ids))
