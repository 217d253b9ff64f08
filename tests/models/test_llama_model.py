# SPDX-License-Identifier: Apache-2.0
"""The stack as a program: every remat policy computes the same, and the cache continues a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps

from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.prefix import PrefixConfig
from dsjax.config import ObjectiveSection
from dsjax.models import build
from dsjax.models.decoder import REMAT
from dsjax.models.slots import Dropout
from dsjax.objectives.objective import Forward
from dsjax.objectives.sft import sft_sums
from dsjax.training.partition import unflatten

Params = dict[str, jax.Array]


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(
            LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], lora_dropout=0.3),
            id="dropout",
            marks=pytest.mark.slow,
        ),
        pytest.param(None, id="full"),
    ],
)
def test_rematerialisation_changes_no_number(adapter: LoraConfig | None) -> None:
    run = tiny_steps.start(adapter=adapter)
    batch = jax.tree.map(jnp.asarray, tiny_steps.batch(rows=2, length=12))
    tokens = jnp.arange(24).reshape(2, 12)
    dropout = None if adapter is None else Dropout(jax.random.key(3), tokens)

    def outcome(remat: str) -> tuple[jax.Array, Params]:
        def loss(trainable: Params) -> jax.Array:
            model = unflatten(run.config.partition.graphdef, {**run.frozen, **trainable})
            return sft_sums(model, batch, Forward(remat, dropout), ObjectiveSection())["loss"]

        lowered = jax.jit(jax.value_and_grad(loss)).lower(run.state.trainable)
        return lowered.compile()(run.state.trainable)

    expected, exact = outcome("none")
    for remat in REMAT:
        loss, gradients = outcome(remat)
        assert float(loss) == float(expected), remat
        for path, gradient in exact.items():
            distance = tiny_steps.distance(np.asarray(gradients[path]), np.asarray(gradient))
            assert distance < 1e-6, (remat, path)


def test_policies_keep_what_they_say() -> None:
    """What a block keeps for its backward pass, by the outputs of the forward scan."""
    run = tiny_steps.start({"num_hidden_layers": 7})  # 7 is the size of nothing else
    batch = jax.tree.map(jnp.asarray, tiny_steps.batch(rows=2, length=12))

    def kept(remat: str) -> int:
        def loss(trainable: Params) -> jax.Array:
            model = unflatten(run.config.partition.graphdef, trainable)
            return sft_sums(model, batch, Forward(remat), ObjectiveSection())["loss"]

        _, residuals = jax.eval_shape(lambda t: jax.vjp(loss, t), run.state.trainable)
        leaves = [x for x in jax.tree.leaves(residuals) if x.ndim > 2 and x.shape[:2] == (7, 2)]
        return sum(x.size for x in leaves)

    one = 7 * 2 * 12 * 32  # the block's input
    assert kept("full") == one
    # The sum with the named mlp_out is the next block's input: keeping it costs nothing more.
    assert kept("names") == 2 * one
    assert kept("names") < kept("dots") < kept("none")


@pytest.mark.slow
def test_a_cache_continues_a_row_after_a_prefix() -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    run = tiny_steps.start({"model_type": "qwen2", **window}, PrefixConfig(2))
    model = tiny_steps.full_model(run)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    expected = model(ids)

    cache, parts = model.init_cache(2, 12), []
    for first, last in [(0, 8), (8, 9)]:
        hidden, cache, _ = model.hidden(ids[:, first:last], positions[:, first:last], cache=cache)
        parts.append(model.head(hidden))

    np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_activations_have_the_dtype_of_the_computation(dtype: str) -> None:
    run = tiny_steps.start(model={"dtype": dtype}, adapter=LoraConfig(r=2, lora_alpha=2))
    model = tiny_steps.full_model(run)
    ids = jnp.zeros((1, 4), jnp.int32)
    hidden = jax.eval_shape(lambda: model.hidden(ids)).states
    assert hidden.dtype == dtype
    assert jax.eval_shape(lambda: model(ids)).dtype == jnp.float32
    assert build(tiny_steps.SHAPE, dtype).dtype == dtype
