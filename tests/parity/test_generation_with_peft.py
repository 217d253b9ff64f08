# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens are those of PEFT's own `generate`, past a window and past yarn's first length."""

from pathlib import Path

import peft_adapters
import pytest
import tiny
import torch

import dsjax
from dsjax.decoding import generate

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

NEW_TOKENS = 24


def _prompts() -> list[list[int]]:
    return [tiny.random_ids(280, 1, length, seed=length)[0].tolist() for length in (3, 33, 17)]


def _generated(model: torch.nn.Module, prompt: list[int], stop_ids: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=2,
    )
    return out[0, len(prompt) :].tolist()


# A window of 8 positions, in which the prefix has no place after the first tokens; a yarn that
# stretches 32 positions.
@pytest.mark.parametrize(("variant", "kind"), [("qwen2_window", "prefix"), ("llama_yarn", "lora")])
def test_tokens_are_those_of_peft(variant: str, kind: str, tmp_path: Path) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    adapter = tmp_path / "adapter"
    if kind == "lora":
        peft_adapters.build_lora(checkpoint, adapter, r=4, target_modules="all-linear")
    else:
        peft_adapters.build_prefix(checkpoint, adapter, tokens=5)
    reference = peft_adapters.load_strictly(checkpoint, adapter)
    unstopped = _generated(reference, _prompts()[1], [1])
    stop_ids = [1, unstopped[len(unstopped) // 2]]
    expected = [_generated(reference, prompt, stop_ids) for prompt in _prompts()]
    assert len(expected[1]) < len(unstopped)

    model = dsjax.load_pretrained(str(checkpoint), adapter=str(adapter), dtype="float32")

    assert generate(model, _prompts(), max_new_tokens=NEW_TOKENS, stop_ids=stop_ids) == expected
