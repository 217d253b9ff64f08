# SPDX-License-Identifier: Apache-2.0
"""What a user may ask a model to continue: each form alone, several of it, and mixtures refused."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

from dsjax.data import encode_chat, encode_text, load_tokenizer
from dsjax.decoding.prompts import read_prompts
from dsjax.errors import ConfigError

CHAT = [{"role": "user", "content": "the question"}]
OTHER = [{"role": "user", "content": "another"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tiny.build_checkpoint(tmp_path_factory.mktemp("model"), "llama_gqa")
    return load_tokenizer(folder)


def test_texts_and_conversations(tokenizer: PreTrainedTokenizerFast):
    text, other = (encode_text(tokenizer, words) for words in ("the question", "another"))
    chat, second = encode_chat(tokenizer, CHAT), encode_chat(tokenizer, OTHER)
    for prompts, expected in [
        ("the question", ([text], True, True)),
        (["the question"], ([text], True, False)),
        (("the question", "another"), ([text, other], True, False)),
        (CHAT, ([chat], True, True)),
        ([CHAT, OTHER], ([chat, second], True, False)),
    ]:
        assert read_prompts(prompts, lambda: tokenizer) == expected


@pytest.mark.parametrize("form", [list, np.array, jnp.array, torch.tensor])
def test_ids_need_no_tokenizer(form: Any):
    def refuse() -> PreTrainedTokenizerFast:
        raise AssertionError

    assert read_prompts(form([3, 1, 4]), refuse) == ([[3, 1, 4]], False, True)
    assert read_prompts(form([[3, 1], [4, 1]]), refuse) == ([[3, 1], [4, 1]], False, False)
    assert read_prompts([form([3, 1]), form([4])], refuse) == ([[3, 1], [4]], False, False)
    assert read_prompts([], refuse) == ([], False, False)


@pytest.mark.parametrize(
    "prompts",
    [
        None,
        7,
        [None],
        [True],
        [0.5],
        np.zeros((1, 2)),
        np.zeros((1, 1, 2), int),
        torch.zeros(2, requires_grad=True),
        ["text", [1, 2]],
        ["text", CHAT],
        [CHAT[0], CHAT],
        [[1, "a"]],
        {"role": "user", "content": "alone"},
    ],
)
def test_anything_else_is_refused(tokenizer: PreTrainedTokenizerFast, prompts: Any):
    with pytest.raises(ConfigError, match=r"^prompts: got .*, expected a text, a conversation"):
        read_prompts(prompts, lambda: tokenizer)
