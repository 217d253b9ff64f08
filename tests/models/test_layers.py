# SPDX-License-Identifier: Apache-2.0
"""Gradients are summed in float32 whatever is computed in, and dropout goes by tokens.

Not here: the layers' values, which the parity tests compare with transformers.
"""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from flax import nnx
from hypothesis import given, settings

from dsjax.adapters.lora import Lora
from dsjax.models.layers import Embedding, Linear, RMSNorm
from dsjax.models.ops import attention
from dsjax.models.ops.attention import Tokens, dot_product_attention
from dsjax.models.ops.grouped_matmul import grouped_matmul
from dsjax.models.slots import Dropout
from dsjax.objectives import cross_entropy

VOCAB, WIDE, HIDDEN = 32, 12, 8


def _filled(module: nnx.Module, rng: np.random.Generator) -> tuple[Any, Any]:
    """The module's definition, and random float32 arrays for it."""
    graphdef, state = nnx.split(module)
    return graphdef, jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), state
    )


def _gradients(module: nnx.Module, rng: np.random.Generator, call: Any, cotangent: Any) -> Any:
    """Of each array of the module, where `call(module)` has this cotangent."""
    graphdef, state = _filled(module, rng)
    _, pull = jax.vjp(lambda state: call(nnx.merge(graphdef, state)), state)
    return {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(pull(cotangent)[0])}


def _close(found: Any, expected: np.ndarray, bound: float = 1e-5) -> None:
    assert found.dtype == jnp.float32
    size = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=bound * size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_token_that_is_seen_65536_times_counts_each_time(dtype: str) -> None:
    ids = jnp.zeros((64, 1024), jnp.int32)
    cotangent = jnp.full((64, 1024, HIDDEN), 0.001, dtype)
    gradient = _gradients(
        Embedding(VOCAB, HIDDEN),
        np.random.default_rng(0),
        lambda embedding: embedding(ids, jnp.dtype(dtype)),
        cotangent,
    )["weight"]
    expected = 65536 * float(cotangent[0, 0, 0])
    np.testing.assert_allclose(gradient[0], expected, rtol=2e-3)  # one after the other, in float32
    assert not np.asarray(gradient[1:]).any()


def test_the_commonest_word_of_a_zipf_batch_has_its_whole_gradient() -> None:
    rng = np.random.default_rng(1)
    ids = np.minimum(rng.zipf(1.3, (32, 1024)), VOCAB) - 1
    cotangent = jnp.asarray(rng.normal(0.5, 1.0, (32, 1024, HIDDEN)), jnp.bfloat16)
    gradient = _gradients(
        Embedding(VOCAB, HIDDEN),
        rng,
        lambda embedding: embedding(jnp.asarray(ids, jnp.int32), jnp.dtype("bfloat16")),
        cotangent,
    )["weight"]
    expected = np.zeros((VOCAB, HIDDEN))
    np.add.at(expected, ids, np.asarray(cotangent, np.float64))
    _close(gradient, expected)


MODULES = {
    "linear": Linear(HIDDEN, WIDE, (None, None), bias=True),
    "embedding": Embedding(VOCAB, HIDDEN),
    "head": Embedding(VOCAB, HIDDEN),
    "norm": RMSNorm(HIDDEN, 1e-6),
}


@jax.jit
def _of_every_kind(arrays: dict[str, jax.Array], states: dict[str, Any], weight_EOI: jax.Array):
    """Gradients of each module's arrays, and of a weight of experts; and a norm's output."""
    x, narrow = arrays["x"], arrays["x"].dtype
    calls = {
        "linear": (lambda m: m(x), arrays["y"]),
        "embedding": (lambda m: m(arrays["ids"], narrow), arrays["like_x"]),
        "head": (lambda m: m.attend(x), arrays["scores"]),
        "norm": (lambda m: m(x), arrays["like_x"]),
    }
    found = {}
    for name, (call, cotangent) in calls.items():
        graphdef = nnx.graphdef(MODULES[name])
        _, pull = jax.vjp(lambda s, g=graphdef, c=call: c(nnx.merge(g, s)), states[name])
        flat = nnx.to_flat_state(pull(cotangent)[0])
        found |= {f"{name}.{path[0]}": variable[...] for path, variable in flat}
    flat_x, flat_y = x.reshape(-1, HIDDEN), arrays["y"].reshape(-1, WIDE)
    _, pull = jax.vjp(lambda w: grouped_matmul(flat_x, w, arrays["sizes"]), weight_EOI)
    normed = x.astype(jnp.float32)
    normed *= jax.lax.rsqrt(jnp.mean(normed * normed, -1, keepdims=True) + 1e-6)
    return found | {"experts": pull(flat_y)[0]}, arrays["like_x"] * normed.astype(narrow)


def _assert_every_gradient_is_summed_in_float32(dtype: str, rows: int, seed: int) -> None:
    """Of what is multiplied, added and looked up, with cotangents that do not cancel out."""
    rng = np.random.default_rng(seed)
    sizes = {"x": HIDDEN, "y": WIDE, "like_x": HIDDEN, "scores": VOCAB}
    arrays = {n: jnp.asarray(rng.normal(0.3, 1.0, (rows, 7, s)), dtype) for n, s in sizes.items()}
    wide = {n: np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for n, a in arrays.items()}
    ids = np.minimum(rng.zipf(1.5, (rows, 7)), VOCAB) - 1
    groups = rng.multinomial(rows * 7, np.ones(3) / 3)
    arrays |= {"ids": jnp.asarray(ids, jnp.int32), "sizes": jnp.asarray(groups, jnp.int32)}
    states = {name: _filled(module, rng)[1] for name, module in MODULES.items()}
    weight_EOI = jnp.asarray(rng.normal(size=(3, WIDE, HIDDEN)), jnp.float32)

    found, scaled = _of_every_kind(arrays, states, weight_EOI)

    _close(found["linear.weight"], wide["y"].T @ wide["x"])
    _close(found["linear.bias"], wide["y"].sum(0))
    table = np.zeros((VOCAB, HIDDEN))
    np.add.at(table, ids.reshape(-1), wide["like_x"])
    _close(found["embedding.weight"], table)
    _close(found["head.weight"], wide["scores"].T @ wide["x"])
    each = np.asarray(scaled, np.float64).reshape(-1, HIDDEN)
    # Each product may be rounded or not, as the compiler fuses; their sum may not be.
    wrong = np.abs(np.asarray(found["norm.weight"], np.float64) - each.sum(0))
    assert (wrong <= 2**-8 * np.abs(each).sum(0)).all()
    group = np.repeat(np.eye(3), groups, axis=0)
    _close(found["experts"], np.einsum("ze,zo,zi->eoi", group, wide["y"], wide["x"]))


_SUMS = given(
    dtype=st.sampled_from(["bfloat16", "float16"]),
    rows=st.sampled_from([8, 600]),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=5)
@_SUMS
def test_every_gradient_is_summed_in_float32(dtype: str, rows: int, seed: int) -> None:
    _assert_every_gradient_is_summed_in_float32(dtype, rows, seed)


@pytest.mark.slow
@settings(max_examples=300)
@_SUMS
def test_every_gradient_is_summed_in_float32_often(dtype: str, rows: int, seed: int) -> None:
    _assert_every_gradient_is_summed_in_float32(dtype, rows, seed)


def test_the_factors_of_lora_are_summed_in_float32() -> None:
    rng = np.random.default_rng(0)
    linear = Linear(HIDDEN, WIDE, (None, None))
    lora = Lora(linear, "q_proj", [4], [2.0], 0.0)
    x, y, out = (
        jnp.asarray(rng.normal(0.3, 1.0, (64, 100, size)), jnp.bfloat16)
        for size in (HIDDEN, WIDE, WIDE)
    )
    graphdef, state = _filled(lora, rng)
    state["scaling"][...] = jnp.float32(2.0)

    def call(state: Any) -> jax.Array:
        return nnx.merge(graphdef, state)(x, lambda x: y, None)

    found = jax.vjp(call, state)[1](out)[0]

    a, b = (
        np.asarray(state[name][...].astype(jnp.bfloat16), np.float64)
        for name in ("lora_A", "lora_B")
    )
    x64, out64 = (np.asarray(v, np.float64).reshape(-1, v.shape[-1]) for v in (x, out))
    low64 = np.asarray(jnp.asarray(x64 @ a.T, jnp.bfloat16), np.float64)
    _close(found["lora_B"][...], 2 * out64.T @ low64, 1e-4)
    # What reaches A is rounded once per token on its way through B.
    d_low = np.asarray(jnp.asarray(2 * out64 @ b, jnp.bfloat16), np.float64)
    _close(found["lora_A"][...], d_low.T @ x64, 1e-4)


def test_chunks_of_the_head_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = tiny_steps.batch(8, 64)
    gradients = []
    for tokens in (8, 512):
        monkeypatch.setattr(cross_entropy, "TOKENS_PER_CHUNK", tokens)
        run = tiny_steps.start({"num_hidden_layers": 1}, model={"dtype": "bfloat16"})
        run.step(batch)
        gradients.append(run.gradients()["lm_head.weight"])
    assert tiny_steps.distance(*gradients) < 1e-5


def test_blocks_of_queries_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    length = 2048
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 1, 8)), jnp.bfloat16) for _ in range(3))
    here = Tokens(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))

    def of_values(block: int) -> np.ndarray:
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        _, pull = jax.vjp(lambda v: dot_product_attention(q * 0, k, v, here, here, None, 1.0), v)
        return np.asarray(pull(jnp.ones_like(v))[0], np.float64)

    whole = of_values(length)
    assert tiny_steps.distance(of_values(4), whole) < 2**-8


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="dense"),
        pytest.param(tiny_steps.V3, id="experts", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("mesh", "pieces"),
    [
        pytest.param(None, 8, marks=pytest.mark.slow),
        ({"data": 8}, 1),
        pytest.param({"fsdp": 4}, 2, marks=pytest.mark.slow),
    ],
)
def test_in_bfloat16_portions_and_devices_add_up_in_float32(
    shape: dict[str, Any], mesh: dict[str, int] | None, pieces: int
) -> None:
    gradients = []
    for axes, count in ((None, 1), (mesh, pieces)):
        training = {"batch_size": 8, "gradient_accumulation_steps": count}
        run = tiny_steps.start(shape, mesh=axes, model={"dtype": "bfloat16"}, training=training)
        # Else XLA leaves out other roundings of activations in each program.
        run.compile(tiny_steps.batch(), xla_allow_excess_precision=False)
        run.step(tiny_steps.batch())
        gradients.append(run.gradients())
    for path, gradient in gradients[0].items():
        assert tiny_steps.distance(gradients[1][path], gradient) < 1e-5, path


def _assert_masks_go_by_tokens(seed: int, p: float, layer: int) -> None:
    rng = np.random.default_rng(seed)
    rows, length, size = 4, 6, 16
    first = int(rng.integers(0, 2**24))
    token = first + np.arange(rows * length).reshape(rows, length)
    order = rng.permutation(token.reshape(-1))
    keep = _keep(seed, layer, jnp.asarray(token), p)
    elsewhere = _keep(seed, layer, jnp.asarray(order.reshape(rows, length)), p)
    np.testing.assert_array_equal(
        elsewhere.reshape(-1, size), keep.reshape(-1, size)[order - first]
    )
    assert len(np.unique(keep.reshape(-1, size), axis=0)) > 1
    assert (keep != _keep(seed, layer + 1, jnp.asarray(token), p)).any()
    assert (keep != _keep(seed + 1, layer, jnp.asarray(token), p)).any()


@jax.jit
def _draw(key: jax.Array, layer: jax.Array, token: jax.Array, p: jax.Array) -> jax.Array:
    return Dropout(key, token).fold_in(layer).keep(p, 16)


def _keep(seed: int, layer: int, token: jax.Array, p: float) -> np.ndarray:
    return np.asarray(_draw(jax.random.key(seed), jnp.int32(layer), token, jnp.float32(p)))


_MASKS = given(
    seed=st.integers(0, 2**30), p=st.floats(0.3125, 0.6875, width=32), layer=st.integers(0, 100)
)


@settings(max_examples=10)
@_MASKS
def test_masks_go_by_tokens_wherever_they_lie(seed: int, p: float, layer: int) -> None:
    _assert_masks_go_by_tokens(seed, p, layer)


@pytest.mark.slow
@settings(max_examples=500)
@_MASKS
def test_masks_go_by_tokens_wherever_they_lie_often(seed: int, p: float, layer: int) -> None:
    _assert_masks_go_by_tokens(seed, p, layer)


def test_a_mask_keeps_as_many_as_it_says() -> None:
    keep = np.asarray(Dropout(jax.random.key(3), jnp.arange(400).reshape(4, 100)).keep(0.9, 500))
    assert abs(keep.mean() - 0.9) < 4 * (0.9 * 0.1 / keep.size) ** 0.5
