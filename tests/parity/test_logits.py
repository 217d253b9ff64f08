# SPDX-License-Identifier: Apache-2.0
"""Every dense variant gives transformers' logits, and packed rows those of their segments."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft_adapters
import pytest
import tiny

import dsjax

pytestmark = pytest.mark.parity

BOUND = 1e-4


@pytest.mark.parametrize("variant", list(tiny.VARIANTS))
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    tiny.build_checkpoint(tmp_path, variant)
    ids = tiny.random_ids(tiny.VARIANTS[variant].get("vocab_size", 288))

    logits = dsjax.load_pretrained(str(tmp_path), dtype="float32")(jnp.asarray(ids))

    assert (logits.dtype, logits.shape) == (jnp.float32, (*ids.shape, logits.shape[-1]))
    expected = tiny.reference_logits(tmp_path, ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("variant", ["llama_biases", "qwen2_bfloat16", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(
    variant: str, tmp_path: Path
) -> None:
    tiny.build_checkpoint(tmp_path, variant)
    ids = tiny.random_ids(288)
    exact = tiny.reference_logits(tmp_path, ids)

    logits = dsjax.load_pretrained(str(tmp_path), dtype="bfloat16")(jnp.asarray(ids))

    ours = np.sqrt(np.mean((np.asarray(logits) - exact) ** 2))
    rounded = tiny.reference_logits(tmp_path, ids, dtype="bfloat16")
    theirs = np.sqrt(np.mean((rounded - exact) ** 2))
    # Equal orders of rounding give equal errors, up to chance: measured, 0.92 to 1.09 of theirs.
    assert ours < 1.25 * theirs


@pytest.mark.parametrize("variant", ["llama_llama3", "qwen2_window", "qwen3_yarn_attn_factor"])
def test_positions_may_be_given(variant: str, tmp_path: Path) -> None:
    tiny.build_checkpoint(tmp_path, variant)
    ids = tiny.random_ids(288)
    positions = np.stack([np.arange(40) + 7, np.arange(40) + 60]).astype(np.int32)

    model = dsjax.load_pretrained(str(tmp_path), dtype="float32")
    logits = model(jnp.asarray(ids), position_ids=jnp.asarray(positions))

    expected = tiny.reference_logits(tmp_path, ids, positions)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("variant", ["llama_gqa", "qwen2_window", "qwen3"])
def test_packed_segments_do_not_see_each_other(variant: str, tmp_path: Path) -> None:
    tiny.build_checkpoint(tmp_path, variant)
    ids = tiny.random_ids(288, batch=1)
    bounds = [(0, 11), (11, 12), (12, 36)]
    positions = np.zeros((1, 40), np.int32)
    segments = np.zeros((1, 40), np.int32)
    for number, (start, stop) in enumerate(bounds, start=1):
        positions[0, start:stop] = np.arange(stop - start)
        segments[0, start:stop] = number

    model = dsjax.load_pretrained(str(tmp_path), dtype="float32")
    logits = model(jnp.asarray(ids), jnp.asarray(positions), jnp.asarray(segments))

    for start, stop in bounds:
        expected = tiny.reference_logits(tmp_path, ids[:, start:stop])
        np.testing.assert_allclose(logits[:, start:stop], expected, rtol=0, atol=BOUND)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("llama_gqa", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
        ("qwen3", {"r": 3, "target_modules": ["q_proj", "lm_head"], "use_rslora": True}),
        ("qwen2", None),
    ],
)
def test_an_adapter_of_peft_is_applied(variant: str, fields: dict | None, tmp_path: Path) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    if fields is None:
        adapter = peft_adapters.build_prefix(checkpoint, tmp_path / "adapter", tokens=6)
    else:
        adapter = peft_adapters.build_lora(checkpoint, tmp_path / "adapter", **fields)
    ids = tiny.random_ids(288)

    model = dsjax.load_pretrained(str(checkpoint), adapter=str(adapter), dtype="float32")

    expected = peft_adapters.logits(peft_adapters.load_strictly(checkpoint, adapter), ids)
    np.testing.assert_allclose(model(jnp.asarray(ids)), expected, rtol=0, atol=BOUND)
