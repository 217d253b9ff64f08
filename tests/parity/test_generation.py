# SPDX-License-Identifier: Apache-2.0
"""Greedy generation from a batch of prompts gives the tokens of transformers, adapters included."""

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

NEW_TOKENS, STOP = 24, 1
LENGTHS = (5, 38, 17)


def _prompts() -> list[list[int]]:
    return [tiny.random_ids(280, 1, length, seed=length)[0].tolist() for length in LENGTHS]


def _continue(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Greedy search without any cache: the whole row again for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS and ids[-1] != STOP:
        ids.append(int(peft_adapters.logits(model, [ids])[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "variant",
    [
        "llama_mqa",
        "llama_llama3_hub",
        "qwen2_window",
        "qwen3_yarn_attn_factor",
        pytest.param("llama_biases", marks=pytest.mark.slow),
        pytest.param("llama_tied", marks=pytest.mark.slow),
        pytest.param("llama_linear_hub", marks=pytest.mark.slow),
        pytest.param("llama_head_dim", marks=pytest.mark.slow),
        pytest.param("qwen2_bfloat16", marks=pytest.mark.slow),
        pytest.param("qwen3_window", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    tiny.build_checkpoint(tmp_path, variant)
    reference = tiny.reference_model(tmp_path)
    expected = []
    for prompt in _prompts():
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=STOP,
            pad_token_id=2,
        )
        expected.append(out[0, len(prompt) :].tolist())

    model = dsjax.load_pretrained(str(tmp_path), dtype="float32")
    tokens = generate(model, _prompts(), max_new_tokens=NEW_TOKENS, stop_ids={STOP})

    assert tokens == expected


@pytest.mark.parametrize(("variant", "kind"), [("llama_gqa", "lora"), ("qwen2", "prefix")])
def test_tokens_with_an_adapter_are_those_of_peft(variant: str, kind: str, tmp_path: Path) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    adapter = tmp_path / "adapter"
    if kind == "lora":
        peft_adapters.build_lora(checkpoint, adapter, r=4, target_modules="all-linear")
    else:
        peft_adapters.build_prefix(checkpoint, adapter, tokens=6)
    reference = peft_adapters.load_strictly(checkpoint, adapter)

    model = dsjax.load_pretrained(str(checkpoint), adapter=str(adapter), dtype="float32")
    tokens = generate(model, _prompts(), max_new_tokens=NEW_TOKENS, stop_ids={STOP})

    assert tokens == [_continue(reference, prompt) for prompt in _prompts()]
