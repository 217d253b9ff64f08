# SPDX-License-Identifier: Apache-2.0
"""Who sees whom: the mask by its definition, blocks like the whole, packed rows like rows apart."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from tiny_steps import Run

from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.prefix import PrefixConfig
from dsjax.config import ObjectiveSection
from dsjax.data import Batch
from dsjax.models.ops import attention
from dsjax.models.ops.attention import PREFIX_SEGMENT, Tokens, attention_mask, dot_product_attention
from dsjax.objectives.objective import Forward
from dsjax.objectives.sft import sft_sums
from dsjax.training.partition import unflatten

POSITIONS = [0, 1, 2, 3, 0, 1, 2, 3, 4, 0]
SEGMENTS = [1, 1, 1, 1, 2, 2, 2, 2, 2, 0]


def _tokens() -> Tokens:
    """Two rows of ten tokens; the second row is one segment."""
    position = jnp.asarray([POSITIONS, range(10)], jnp.int32)
    return Tokens(position, jnp.asarray([SEGMENTS, [1] * 10], jnp.int32))


def _with_prefix(tokens: Tokens) -> Tokens:
    """The same tokens three places later, after a prefix."""
    places = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32), (2, 3))
    return Tokens(
        jnp.concatenate([places, tokens.position + 3], 1),
        jnp.concatenate([jnp.full((2, 3), PREFIX_SEGMENT, jnp.int32), tokens.segment], 1),
    )


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("prefix", [False, True])
def test_the_mask_is_its_definition(window: int | None, prefix: bool) -> None:
    tokens = _tokens()
    query = Tokens(tokens.position + 3, tokens.segment) if prefix else tokens
    key = _with_prefix(tokens) if prefix else tokens

    mask = np.asarray(attention_mask(query, key, window))

    (q_pos, q_seg), (k_pos, k_seg) = (map(np.asarray, query), map(np.asarray, key))
    for row, i, j in np.ndindex(mask.shape):
        same = k_seg[row, j] in (q_seg[row, i], PREFIX_SEGMENT)
        back = q_pos[row, i] - k_pos[row, j]
        assert mask[row, i, j] == (same and back >= 0 and (window is None or back < window))


@pytest.mark.parametrize(("window", "prefix"), [(None, False), (3, True)])
def test_blocks_of_queries_give_the_whole_row(
    window: int | None, prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    places = 13 if prefix else 10
    tokens = _tokens()
    query = Tokens(tokens.position + 3, tokens.segment) if prefix else tokens
    key = _with_prefix(tokens) if prefix else tokens
    q = jax.random.normal(keys[0], (2, 10, 4, 6))
    k, v = (jax.random.normal(keys[i], (2, places, 2, 6)) for i in (1, 2))
    weights = jax.random.normal(keys[3], (2, 10, 4, 6))

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = dot_product_attention(q, k, v, query, key, window, 0.4)
        return jnp.sum(out * weights), out

    def both() -> Any:  # a new function each time: jit remembers the block size of the first
        lowered = jax.jit(jax.value_and_grad(lambda *x: run(*x), (0, 1, 2), has_aux=True)).lower(
            q, k, v
        )
        return lowered.compile()(q, k, v)

    whole = both()
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)  # 10 queries: two blocks and a half
    blocks = both()

    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=3e-6)
    jax.tree.map(close, blocks, whole)


WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LoraConfig(r=2, lora_alpha=4)},
    "window": {
        "shape": {"model_type": "qwen2", **WINDOW},
        "adapter": LoraConfig(r=2, lora_alpha=4),
    },
    "prefix": {"shape": {"model_type": "qwen3"}, "adapter": PrefixConfig(3)},
    "window and prefix": {"shape": {"model_type": "qwen2", **WINDOW}, "adapter": PrefixConfig(2)},
}


def _apart(batch: Batch) -> Batch:
    """Every segment of a batch in a row of its own."""
    rows = []
    for row, number in [(r, n) for r in range(len(batch.input_ids)) for n in (1, 2)]:
        at = batch.segment_ids[row] == number
        pad = (0, at.size - at.sum())
        parts = Batch(*(np.pad(field[row][at], pad) for field in batch))
        rows.append(parts._replace(segment_ids=np.pad(np.ones(at.sum(), np.int32), pad)))
    return Batch(*(np.stack(fields) for fields in zip(*rows, strict=True)))


def _loss_and_gradients(run: Run, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    def loss(trainable: dict[str, jax.Array], batch: Batch) -> jax.Array:
        model = unflatten(run.config.partition.graphdef, {**run.frozen, **trainable})
        return sft_sums(model, batch, Forward(), ObjectiveSection())["loss"]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(run.state.trainable, batch)
    return compiled.compile()(run.state.trainable, batch)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("window", marks=pytest.mark.slow),
        pytest.param("prefix", marks=pytest.mark.slow),
        "lora",
        "window and prefix",
    ],
)
def test_packed_rows_are_their_segments_apart(case: str) -> None:
    run = tiny_steps.start(**CASES[case])
    packed = tiny_steps.batch(rows=2, length=14)

    loss, gradients = _loss_and_gradients(run, packed)
    expected, exact = _loss_and_gradients(run, _apart(packed))

    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for path, gradient in exact.items():
        assert tiny_steps.distance(np.asarray(gradients[path]), np.asarray(gradient)) < 2e-6, path


def test_padding_changes_nothing() -> None:
    run = tiny_steps.start(adapter=PrefixConfig(2))
    short = tiny_steps.batch(rows=2, length=12)
    long = Batch(*(np.pad(field, ((0, 0), (0, 5))) for field in short))
    rubbish = long._replace(
        input_ids=np.where(long.segment_ids > 0, long.input_ids, 7),
        targets=np.where(long.segment_ids > 0, long.targets, 9),
    )

    expected, exact = _loss_and_gradients(run, short)
    for batch in (long, rubbish):
        loss, gradients = _loss_and_gradients(run, batch)
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)
        for path, gradient in exact.items():
            ours = np.asarray(gradients[path])
            assert tiny_steps.distance(ours, np.asarray(gradient)) < 2e-6, path
