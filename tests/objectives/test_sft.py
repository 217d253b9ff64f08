# SPDX-License-Identifier: Apache-2.0
"""The chunked loss is the plain one, in value and gradient, and never holds the logits of a row."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from flax import nnx

from dsjax.adapters.lora import LoraConfig
from dsjax.config import ObjectiveSection
from dsjax.data import Batch
from dsjax.models import Model
from dsjax.models.decoder import Hidden
from dsjax.models.slots import Dropout
from dsjax.objectives import cross_entropy
from dsjax.objectives.objective import Forward, Sums
from dsjax.objectives.sft import sft_sums
from dsjax.training.step import make_train_step

OPTIONS = ObjectiveSection()


class Head(Model):
    """A model whose hidden states are given."""

    def __init__(self, hidden_BTD: jax.Array, weight_VD: jax.Array):
        self.states, self.weight = nnx.Param(hidden_BTD), nnx.Param(weight_VD)

    def all_gather_embeddings(self, layout: None) -> None:
        pass

    def hidden(self, *batch: Any, **forward: Any) -> Hidden:
        return Hidden(self.states[...], None, None)

    def head(self, hidden: jax.Array, dropout: Any = None) -> jax.Array:
        return hidden @ self.weight[...].T


def _inputs(length: int) -> tuple[jax.Array, jax.Array, Batch]:
    rng = np.random.default_rng(length)
    hidden = jnp.asarray(rng.normal(size=(2, length, 8)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(11, 8)), jnp.float32)
    batch = tiny_steps.batch(2, length, vocab_size=11, packed=False)
    return hidden, weight, jax.tree.map(jnp.asarray, batch)


def _plain(hidden: jax.Array, weight: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    logits = hidden @ weight.T
    every = (jnp.arange(2)[:, None], jnp.arange(hidden.shape[1]))
    picked = jax.nn.log_softmax(logits)[*every, batch.targets]
    hits = jnp.argmax(logits, -1) == batch.targets
    return -jnp.sum(picked * batch.loss_weights), jnp.sum(hits * batch.loss_weights)


@pytest.mark.parametrize(("length", "shards"), [(3, 1), (8, 1), (13, 1), (5, 2)])
def test_chunks_give_the_plain_cross_entropy(
    length: int, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "TOKENS_PER_CHUNK", 8 // shards)
    hidden, weight, batch = _inputs(length)

    def chunked(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, Sums]:
        sums = sft_sums(Head(hidden, weight), batch, Forward(row_shards=shards), OPTIONS)
        return sums["loss"], sums

    def plain(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _plain(hidden, weight, batch)

    (loss, sums), gradients = jax.value_and_grad(chunked, (0, 1), has_aux=True)(hidden, weight)
    (expected, hits), exact = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, weight)

    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(sums["correct"]) == float(hits)
    assert float(sums["weight"]) == batch.loss_weights.sum()
    assert int(sums["tokens"]) == (batch.segment_ids > 0).sum()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), gradients, exact)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_train_step_has_no_array_of_all_logits(
    tied: bool, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "TOKENS_PER_CHUNK", 64)
    adapter = LoraConfig(r=2, lora_alpha=2) if adapted else None
    vocab_size, rows, length = 61, 4, 56  # 61 is the size of nothing else
    run = tiny_steps.start({"vocab_size": vocab_size, "tie_word_embeddings": tied}, adapter)
    batch = tiny_steps.batch(rows, length, vocab_size)

    text = str(jax.make_jaxpr(make_train_step(run.config, run.state))(run.state, run.frozen, batch))

    shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]*\b61\b[\d,]*)\]", text)]
    assert (rows, 64 // rows, vocab_size) in shapes  # a chunk's logits: the search finds them
    assert max(int(np.prod(shape)) for shape in shapes) == 64 * vocab_size
    assert rows * length > 64


@pytest.mark.parametrize(
    "chunk", [16, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 1000))]
)
def test_dropout_of_an_adapted_head_goes_by_tokens_not_by_chunks(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"], lora_dropout=0.5)
    run = tiny_steps.start({"num_hidden_layers": 1}, adapter)
    batch = jax.tree.map(jnp.asarray, tiny_steps.batch(4, 12))
    dropout = Dropout(jax.random.key(0), jnp.arange(48).reshape(4, 12))
    model = tiny_steps.full_model(run)
    states = model.hidden(*batch[:1], batch.position_ids, batch.segment_ids).states
    keep = dropout.fold_in(model.lm_head.adapter.seed).keep(0.5, states.shape[-1])
    low = jnp.where(keep, states * 2, 0) @ model.lm_head.adapter.lora_A[...].T
    logits = states @ model.lm_head.weight[...].T + low @ model.lm_head.adapter.lora_B[...].T
    expected, _ = cross_entropy._cross_entropy(logits, batch.targets, batch.loss_weights)

    monkeypatch.setattr(cross_entropy, "TOKENS_PER_CHUNK", chunk)
    found = sft_sums(model, batch, Forward(dropout=dropout), OPTIONS)["loss"]

    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert len(np.unique(np.asarray(keep).reshape(48, -1), axis=0)) == 48
