# SPDX-License-Identifier: Apache-2.0
"""The loss, and the gradient of every tensor, are those of transformers on torch."""

from pathlib import Path

import deepseek_variants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch_reference
from flax import nnx

import dsjax
from dsjax.config import ObjectiveSection
from dsjax.data import Batch
from dsjax.models import entries_of
from dsjax.objectives.objective import Forward
from dsjax.objectives.sft import sft_sums
from dsjax.training.partition import flatten, unflatten

pytestmark = pytest.mark.parity

BOUND = 1e-4

# One of each kind of layer, mask and embedding; the others are config dialects of these.
QUICK = (
    "llama_gqa",
    "llama_mqa",
    "llama_biases",
    "llama_tied",
    "qwen2_window",
    "qwen3_yarn_attention_factor",
    "deepseek_v2_groups",
)


def _batch(rows: list[torch_reference.Row]) -> Batch:
    """The rows padded on the right, their labels moved one to the left."""
    padded = {name: tensor.numpy() for name, tensor in torch_reference.pad(rows).items()}
    real = padded["attention_mask"].astype(np.int32)
    labels = np.full_like(padded["labels"], -100)
    labels[:, :-1] = padded["labels"][:, 1:]
    return Batch(
        input_ids=jnp.asarray(padded["input_ids"], jnp.int32),
        targets=jnp.asarray(np.where(labels == -100, 0, labels), jnp.int32),
        loss_weights=jnp.asarray(labels != -100, jnp.float32),
        segment_ids=jnp.asarray(real),
        position_ids=jnp.asarray(np.arange(real.shape[1]) * real, jnp.int32),
    )


@pytest.mark.parametrize(
    ("variant", "remat"),
    [(variant, "none") for variant in QUICK]
    + [("qwen2", "full"), ("qwen3", "dots"), ("llama_mha", "names"), ("deepseek_v3", "full")]
    + [
        pytest.param(variant, "none", marks=pytest.mark.slow)
        for variant in tiny.VARIANTS
        if variant not in QUICK
    ],
)
def test_loss_and_gradients_are_those_of_torch(variant: str, remat: str, tmp_path: Path) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    vocab_size = tiny.VARIANTS[variant].get("vocab_size", 288)
    rows = torch_reference.read_rows(
        torch_reference.write_rows(tmp_path / "rows.jsonl", vocab_size, count=3)
    )
    reference = tiny.reference_model(checkpoint)
    expected = torch_reference.loss_sum(reference, rows)
    expected.backward()

    model = dsjax.load_pretrained(str(checkpoint), dtype="float32")
    graphdef, params = nnx.graphdef(model), flatten(model)

    def loss(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, options = unflatten(graphdef, params), ObjectiveSection()
        sums = sft_sums(found, _batch(rows), Forward(remat), options)
        return sums["loss"], sums["weight"]

    (total, weight), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    assert float(weight) == torch_reference.trained_tokens(rows)
    assert float(total) == pytest.approx(expected.item(), rel=1e-6)
    expected_gradients = {
        name: gradient for name, _, gradient in deepseek_variants.file_tensors(reference)
    }
    entries = entries_of(model)
    assert {entry.hf for entry in entries} == set(expected_gradients)
    for entry in entries:
        ours = torch.tensor(np.asarray(gradients[entry.path])[entry.index])
        theirs = expected_gradients[entry.hf]
        if theirs is None:
            assert any(part in entry.hf for part in deepseek_variants.NEVER_TRAINED), entry.hf
            assert not ours.any(), entry.hf
            continue
        error, size = (float(torch.linalg.vector_norm(x)) for x in (ours - theirs, theirs))
        # An expert that no token went to has a gradient of exactly zero.
        assert error <= BOUND * size, (entry.hf, error, size)
