# SPDX-License-Identifier: Apache-2.0
"""For every token the router chooses the experts that transformers' routers choose, as strongly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax import nnx
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
