# SPDX-License-Identifier: Apache-2.0
"""Greedy generation from a batch of prompts gives the tokens of transformers, adapters included."""

from pathlib import Path

import peft_adapters
import pytest
import tiny
import torch

import dsjax
from dsjax.decoding.decode import generate

pytestmark = pytest.mark.parity

NEW_TOKENS, STOP = 24, 1
LENGTHS = (3, 38, 17)


def _prompts() -> list[list[int]]:
    return [tiny.random_ids(280, 1, length, seed=length)[0].tolist() for length in LENGTHS]


def _generated(model: torch.nn.Module, prompt: list[int], stop_ids: list[int]) -> list[int]:
    """Greedy search by the reference's own `generate`, cache and all."""
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


def _searched(model: torch.nn.Module, prompt: list[int], stop_ids: list[int]) -> list[int]:
    """Greedy search by whole forward passes: transformers 5.24's `generate` hands the model a cache
    of its own beside the one that PEFT 0.21 filled with the prefix, which is then ignored.
    """
    ids = torch.tensor([prompt])
    while ids.shape[1] < len(prompt) + NEW_TOKENS and ids[0, -1].item() not in stop_ids:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("llama_mqa", marks=pytest.mark.slow),
        "llama_llama3_hub",
        "qwen2_window",
        pytest.param("qwen3_yarn_attn_factor", marks=pytest.mark.slow),
        pytest.param("deepseek_v2_groups", marks=pytest.mark.slow),
        "deepseek_v3_fp8_mtp_hub",
        pytest.param("deepseek_v32_sparse", marks=pytest.mark.slow),
        "deepseek_moe_hub",
        pytest.param("llama_biases", marks=pytest.mark.slow),
        pytest.param("llama_tied", marks=pytest.mark.slow),
        pytest.param("llama_linear_hub", marks=pytest.mark.slow),
        pytest.param("llama_head_dim", marks=pytest.mark.slow),
        pytest.param("qwen2_bfloat16", marks=pytest.mark.slow),
        pytest.param("qwen3_window", marks=pytest.mark.slow),
        pytest.param("deepseek_v2_lite_hub", marks=pytest.mark.slow),
        pytest.param("deepseek_v2_biases", marks=pytest.mark.slow),
        pytest.param("deepseek_v3_plain", marks=pytest.mark.slow),
        pytest.param("deepseek_v3_odd", marks=pytest.mark.slow),
        pytest.param("deepseek_v3_dense_tied", marks=pytest.mark.slow),
        pytest.param("deepseek_v32_dense", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    tiny.build_checkpoint(tmp_path, variant)
    reference = tiny.reference_model(tmp_path)
    expected = [_generated(reference, prompt, [STOP]) for prompt in _prompts()]

    model = dsjax.load_pretrained(str(tmp_path), dtype="float32")
    tokens = generate(model, _prompts(), max_new_tokens=NEW_TOKENS, stop_ids={STOP})

    assert tokens == expected


# Among them a window of 8 positions, in which the prefix has no place after the first tokens, and
# a yarn that stretches 32 positions.
@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ("llama_gqa", "lora"),
        pytest.param("llama_yarn", "lora", marks=pytest.mark.slow),
        pytest.param("qwen2", "prefix", marks=pytest.mark.slow),
        ("qwen2_window", "prefix"),
    ],
)
def test_tokens_with_an_adapter_are_those_of_peft(variant: str, kind: str, tmp_path: Path) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    adapter = tmp_path / "adapter"
    if kind == "lora":
        peft_adapters.build_lora(checkpoint, adapter, r=4, target_modules="all-linear")
    else:
        peft_adapters.build_prefix(checkpoint, adapter, tokens=5)
    reference = peft_adapters.load_strictly(checkpoint, adapter)
    search = _generated if kind == "lora" else _searched
    unstopped = search(reference, _prompts()[1], [STOP])
    stop_ids = [STOP, unstopped[len(unstopped) // 2]]
    expected = [search(reference, prompt, stop_ids) for prompt in _prompts()]
    assert len(expected[1]) < len(unstopped)

    model = dsjax.load_pretrained(str(checkpoint), adapter=str(adapter), dtype="float32")

    assert generate(model, _prompts(), max_new_tokens=NEW_TOKENS, stop_ids=stop_ids) == expected
