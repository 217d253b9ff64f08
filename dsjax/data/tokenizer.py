# SPDX-License-Identifier: Apache-2.0
"""The checkpoint's tokenizer, loaded without changing what it does.

In: a checkpoint directory. Out: a `transformers` fast tokenizer with the checkpoint's chat template
and with `add_bos_token` as the checkpoint means it; text -> tokens with BOS exactly once.
Not here: chat templates at work (`chat`). Nothing from the checkpoint is ever executed, except the
chat template in Jinja's sandbox.
"""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dsjax.config.json_file import read_object
from dsjax.errors import ConfigError

ROUND_TRIP = "hello world, one two"
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.json"
SETTINGS = (CONFIG, TEMPLATE, "special_tokens_map.json", "added_tokens.json")
STRFTIME = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer that lies beside a checkpoint.

    Args:
      directory: folder with `tokenizer.json` and, as a rule, `tokenizer_config.json`.

    Returns:
      The tokenizer. `add_bos_token` says whether plain text starts with BOS; `chat_template` is the
      checkpoint's own, or None.

    Raises:
      ConfigError: no `tokenizer.json`, an unreadable one, or one that loses spaces.
    """
    folder = Path(directory)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"model.path: got {folder} without tokenizer.json, expected the checkpoint's tokenizer "
            "beside its weights; copy its tokenizer files there, or train on rows of "
            "`data.format: tokens`, which need none"
        )
    settings = {
        name: read_object(folder / name, "model.path")
        for name in SETTINGS
        if (folder / name).is_file()
    }
    try:
        # Trap: the class that tokenizer_config.json names (LlamaTokenizerFast) replaces the
        # byte-level pre-tokenizer in transformers 5 and drops spaces. This one leaves it alone.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        _set_bos(tokenizer, settings.get(CONFIG, {}), folder)
        _set_template(tokenizer, settings, folder)
        _check_round_trip(tokenizer, folder)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ConfigError(
            f"model.path: got tokenizer files in {folder} that cannot be read "
            f"({type(error).__name__}: {str(error)[:300]}), expected valid tokenizer.json and "
            "tokenizer_config.json; fetch them again"
        ) from error
    return tokenizer


def find_tokenizer(
    directory: str | Path, form: str, today: datetime | None = None
) -> PreTrainedTokenizerFast | None:
    """Load the tokenizer; None where rows are (`form` tokens), or may be, tokens already.

    Args:
      directory: folder of the checkpoint.
      form: `data.format`.
      today: what the chat template takes for the present; None leaves it the clock. A run that goes
        on tomorrow has to see the tokens that it began with.
    """
    missing = not (Path(directory) / "tokenizer.json").is_file()
    if form == "tokens" or (form == "auto" and missing):
        return None
    tokenizer = load_tokenizer(directory)
    if today is not None and isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = dated(tokenizer.chat_template, today)
    return tokenizer


def dated(template: str, today: datetime) -> str:
    """Write a date in a chat template in the place of each `strftime_now("...")`.

    The function itself cannot be given: transformers makes it, for every template the same. A
    format that the template computes stays; its rows are others tomorrow, which a run refuses.
    """

    def date(found: re.Match[str]) -> str:
        return json.dumps(today.strftime(found[2]))

    return STRFTIME.sub(date, template)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, add_bos: bool = True) -> list[int]:
    """Tokenise text as the model reads it: BOS exactly once if the tokenizer adds one, no EOS.

    Args:
      tokenizer: from `load_tokenizer`.
      text: plain text, or a rendered chat, which usually begins with BOS already.
      add_bos: False for text that continues other text.
    """
    ids = backend(tokenizer).encode(text, add_special_tokens=False).ids
    return bos_before(tokenizer, ids) + ids if add_bos else ids


def bos_before(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """Return what must stand before `ids`: [BOS] if the tokenizer adds one and it is not there."""
    bos = cast(int | None, tokenizer.bos_token_id)
    if bos is None or not tokenizer.add_bos_token or ids[:1] == [bos]:
        return []
    return [bos]


def backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return the `tokenizers.Tokenizer` inside; calling it directly is five times faster."""
    return tokenizer.backend_tokenizer


def _set_bos(tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], folder: Path) -> None:
    """Decide whether plain text starts with BOS.

    transformers 5 ignores `add_bos_token` of the file where tokenizer.json has a post-processor of
    its own (V3's is a plain ByteLevel), so the flag is read here.
    """
    flag = settings.get("add_bos_token")
    if not isinstance(flag, bool | None):
        raise ConfigError(
            f"model.path: got {str(flag)[:100]!r} as add_bos_token in {folder / CONFIG}, expected "
            "true, false or null; correct it"
        )
    inner = backend(tokenizer)
    inner.no_truncation()
    inner.no_padding()
    bos = tokenizer.bos_token_id
    if flag is None and bos is not None:
        flag = inner.encode("a", add_special_tokens=True).ids[:1] == [bos]
    tokenizer.add_bos_token = bool(flag) and bos is not None


def _set_template(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, dict[str, Any]], folder: Path
) -> None:
    """Find the chat template in the places where `transformers` does not look by itself."""
    for name in ("chat_template.jinja", "assets/chat_template.jinja"):
        if tokenizer.chat_template is None and (folder / name).is_file():
            tokenizer.chat_template = (folder / name).read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = settings.get(TEMPLATE, {}).get("chat_template")
    given = tokenizer.chat_template
    several = list(given.values()) if isinstance(given, dict) else [given]
    if given is not None and not all(isinstance(template, str) for template in several):
        raise ConfigError(
            f"model.path: got {str(given)[:100]!r} as chat_template in the tokenizer files in "
            f"{folder}, expected text, or a name and text for each of several; correct it"
        )


def _check_round_trip(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    ids = backend(tokenizer).encode(ROUND_TRIP, add_special_tokens=False).ids
    text = backend(tokenizer).decode(ids, skip_special_tokens=False)
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
    if text.strip() != ROUND_TRIP and not unknown:
        raise ConfigError(
            f"model.path: got a tokenizer in {folder} that turns {ROUND_TRIP!r} into {text!r}, "
            "expected the same text back; its tokenizer.json is damaged or was re-saved by a "
            "version that drops spaces: fetch the original"
        )
