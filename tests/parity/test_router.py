# SPDX-License-Identifier: Apache-2.0
"""For every token the router chooses the experts that transformers' routers choose, as strongly."""

from collections.abc import Callable
from functools import cache
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax import nnx
from hypothesis import given, settings
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32TopkRouter

from dsjax.models.deepseek.config import parse_config
from dsjax.models.moe import Router

pytestmark = pytest.mark.parity

HIDDEN, TOKENS = 48, 400

ROUTERS = {
    "deepseek_v2": DeepseekV2TopkRouter,
    "deepseek_v3": DeepseekV3TopkRouter,
    "deepseek_v32": DeepseekV32TopkRouter,
}

GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
GROUPS = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}

# (model_type, experts, chosen of them, the rest); the first of each kind has the real sizes.
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "v2-lite": ("deepseek_v2", 64, 6, GREEDY),
    "v2": ("deepseek_v2", 160, 6, {**GROUPS, "n_group": 8, "topk_group": 3}),
    "v2-all-of-the-groups": ("deepseek_v2", 16, 6, {**GROUPS, "n_group": 8, "topk_group": 3}),
    "v2-one-by-one": ("deepseek_v2", 12, 1, {**GROUPS, "n_group": 12, "topk_group": 1}),
    "v3": ("deepseek_v3", 256, 8, {"n_group": 8, "topk_group": 4}),
    "v3-not-normalised": (
        "deepseek_v3",
        32,
        5,
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    ),
    "v3-one-group": ("deepseek_v3", 24, 4, {"n_group": 1, "topk_group": 1}),
    "v3-groups-of-two": ("deepseek_v3", 16, 3, {"n_group": 8, "topk_group": 2}),
    "v32": ("deepseek_v32", 256, 8, {"n_group": 8, "topk_group": 4}),
}

# With a low bias all scores are below 0: what is masked must be lower still.
BIASES = {"mixed": (-0.1, 0.1), "low": (-2.1, -1.9)}


def _config(case: str) -> Any:
    kind, experts, chosen, others = CASES[case]
    return tiny.CONFIGS[kind](
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=16,
        first_k_dense_replace=0,
        **others,
    )


def _reference(config: Any, bounds: tuple[float, float], dtype: torch.dtype) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(4)
    router = ROUTERS[config.model_type](config)
    router.weight.data.normal_(0.0, 0.3, generator=generator)
    router.weight.data = router.weight.data.to(dtype)
    if config.model_type != "deepseek_v2":
        router.e_score_correction_bias.uniform_(*bounds, generator=generator)
    return router


def _ours(config: Any, reference: torch.nn.Module) -> Router:
    router = Router(parse_config(config.to_dict()).router, HIDDEN, layers=1)
    values = reference.state_dict()
    dtype = "bfloat16" if values["weight"].dtype == torch.bfloat16 else "float32"
    params = {name: jnp.asarray(tensor.float().numpy()) for name, tensor in values.items()}
    params["weight"] = params["weight"].astype(dtype)
    state: dict[Any, Any] = {(name,): value for name, value in params.items()}
    return nnx.merge(nnx.graphdef(router), nnx.from_flat_state(state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "bias"),
    [(case, "mixed") for case in CASES] + [("v3", "low"), ("v3-groups-of-two", "low")],
)
@torch.no_grad()
def test_experts_and_weights_are_those_of_transformers(case: str, bias: str, dtype: str) -> None:
    config = _config(case)
    reference = _reference(config, BIASES[bias], getattr(torch, dtype))
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, TOKENS // 2, HIDDEN, generator=generator).to(getattr(torch, dtype))
    _, weights, experts = reference(x)

    x_BTD = jnp.asarray(x.float().numpy()).astype(dtype)
    routing, _ = _ours(config, reference)(x_BTD, jnp.ones(x.shape[:2], bool))

    ours, theirs = (np.asarray(a).reshape(TOKENS, -1) for a in (routing.experts, experts))
    our_order, their_order = np.argsort(ours), np.argsort(theirs)
    np.testing.assert_array_equal(
        np.take_along_axis(ours, our_order, 1), np.take_along_axis(theirs, their_order, 1)
    )
    assert len(np.unique(theirs)) > config.n_routed_experts // 2  # else the case says little
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(routing.weights).reshape(TOKENS, -1), our_order, 1),
        np.take_along_axis(weights.numpy(), their_order, 1),
        rtol=0,
        atol=1e-6 * config.routed_scaling_factor,
    )
    assert routing.weights.dtype == jnp.float32


@pytest.mark.parametrize("case", ["v2", "v3"])
def test_the_gradient_of_the_weights_is_that_of_transformers(case: str) -> None:
    config = _config(case)
    reference = _reference(config, BIASES["mixed"], torch.float32)
    x = torch.randn(1, 32, HIDDEN, generator=torch.Generator().manual_seed(8))
    _, weights, experts = reference(x)
    # Of every weight a number that goes with its expert, whatever the order they come in.
    (weights * torch.sin(experts.float())).sum().backward()
    router, x_BTD = _ours(config, reference), jnp.asarray(x.numpy())
    graphdef, state = nnx.split(router)

    def total(state: Any) -> jax.Array:
        routing, _ = nnx.merge(graphdef, state)(x_BTD, jnp.ones(x.shape[:2], bool))
        return jnp.sum(routing.weights * jnp.sin(routing.experts.astype(jnp.float32)))

    gradients = jax.grad(total)(state)

    theirs = reference.weight.grad
    ours = torch.tensor(np.asarray(gradients["weight"][...]))
    assert torch.linalg.vector_norm(ours - theirs) < 1e-5 * torch.linalg.vector_norm(theirs)
    if case == "v3":
        assert not gradients["e_score_correction_bias"][...].any()


EXTREME = {
    "deepseek_v2": ("v2", {"n_group": 4, "topk_group": 2}),
    "deepseek_v3": ("v3", {"n_group": 4, "topk_group": 2}),
    "one group": ("v3-one-group", {"n_group": 1, "topk_group": 1}),
}
EXPERTS = 16


@cache
def _extreme_routers(kind: str) -> tuple[torch.nn.Module, Callable[..., Any]]:
    """Both routers with the identity as their weight: what they are given are the logits."""
    case, groups = EXTREME[kind]
    model_type, _, _, others = CASES[case]
    config = tiny.CONFIGS[model_type](
        hidden_size=EXPERTS,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        first_k_dense_replace=0,
        **{**others, **groups},
    )
    reference = _reference(config, BIASES["mixed"], torch.float32)
    reference.weight.data = torch.eye(EXPERTS)
    router = Router(parse_config(config.to_dict()).router, EXPERTS, layers=1)
    values = reference.state_dict()
    state: dict[Any, Any] = {(name,): jnp.asarray(t.numpy()) for name, t in values.items()}
    router = nnx.merge(nnx.graphdef(router), nnx.from_flat_state(state))
    return reference, jax.jit(lambda x, cotangent: _our_weights(router, x, cotangent))


def _torch_weights(reference: torch.nn.Module, x: np.ndarray, cotangent: np.ndarray):
    """What each expert is multiplied by for each token, and the gradient of its inner product."""
    logits = torch.tensor(x, requires_grad=True)
    _, weights, experts = reference(logits)
    dense = torch.zeros(len(x), EXPERTS).scatter(1, experts, weights)
    (dense * torch.tensor(cotangent)).sum().backward()
    assert logits.grad is not None
    return dense.detach().numpy(), logits.grad.numpy()


def _our_weights(router: Any, x_TE: jax.Array, cotangent: jax.Array):
    """The same, and the gradient of the balance loss."""

    def total(x_TE: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        routing, work = router(x_TE[None], jnp.ones((1, len(x_TE)), bool))
        took = jax.nn.one_hot(routing.experts[0], EXPERTS)
        dense_TE = jnp.sum(took * routing.weights[0][..., None], axis=1)
        return jnp.sum(dense_TE * cotangent), (dense_TE, work.balance)

    def balance(x_TE: jax.Array) -> jax.Array:
        return jnp.sum(total(x_TE)[1][1])

    gradient, (dense, _) = jax.grad(total, has_aux=True)(x_TE)
    return dense, gradient, jax.grad(balance)(x_TE)


def _assert_extreme_logits_are_as_in_torch(kind: str, centre: float, width: float, seed: int):
    rng = np.random.default_rng(seed)
    # Distinct ones: what torch chooses among equals is its own affair.
    ranks = rng.permuted(np.tile(np.arange(EXPERTS) - EXPERTS / 2, (8, 1)), axis=1)
    x = (centre + width * ranks).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    reference, ours_of = _extreme_routers(kind)

    weights, gradient = _torch_weights(reference, x, cotangent)
    ours, our_gradient, of_balance = ours_of(x, cotangent)

    size = reference.routed_scaling_factor
    np.testing.assert_allclose(ours, weights, rtol=0, atol=2e-5 * size)
    np.testing.assert_allclose(our_gradient, gradient, rtol=0, atol=2e-5 * size)
    assert np.isfinite(of_balance).all()


@pytest.mark.parametrize("kind", EXTREME)
@pytest.mark.parametrize("centre", [0.0, 30.0, -30.0, -46.0, -60.0, -90.0, -1e4, 1e4])
def test_extreme_logits_have_the_weights_and_gradients_of_torch(kind: str, centre: float) -> None:
    _assert_extreme_logits_are_as_in_torch(kind, centre, 0.3, seed=1)


def test_no_expert_outside_the_chosen_groups_is_taken_for_one_that_underflowed() -> None:
    reference, ours_of = _extreme_routers("deepseek_v2")
    groups = [[4.0, 3.9, 3.8, 3.7], [3.0] * 4, [5.0] + 3 * [-300.0], [5.1] + 3 * [-300.0]]
    x = np.tile(np.concatenate(groups).astype(np.float32), (8, 1))
    weights, gradient = _torch_weights(reference, x, np.cos(x))
    ours, our_gradient, _ = ours_of(x, np.cos(x))
    np.testing.assert_allclose(ours, weights, rtol=1e-5)
    np.testing.assert_allclose(our_gradient, gradient, rtol=1e-4, atol=1e-6)
    assert (weights > 0).sum(1).tolist() == [2] * 8


_EXTREMES = given(
    kind=st.sampled_from(sorted(EXTREME)),
    centre=st.floats(-120, 40, width=32) | st.floats(-1e4, 1e4, width=32),
    width=st.sampled_from([0.01, 0.1, 1.0, 10.0, 400.0]),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=15)
@_EXTREMES
def test_any_logits_do(kind: str, centre: float, width: float, seed: int) -> None:
    _assert_extreme_logits_are_as_in_torch(kind, centre, width, seed)


@pytest.mark.slow
@settings(max_examples=400)
@_EXTREMES
def test_any_logits_do_often(kind: str, centre: float, width: float, seed: int) -> None:
    _assert_extreme_logits_are_as_in_torch(kind, centre, width, seed)
