# SPDX-License-Identifier: Apache-2.0
"""IA3: which maps get a vector, what is refused, and that meshes and remat change nothing."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from flax import nnx

from dsjax import adapters
from dsjax.adapters import ia3
from dsjax.adapters.ia3 import IA3, IA3Config
from dsjax.config import AdapterSection
from dsjax.errors import ConfigError
from dsjax.models.layers import Linear, product

EVERYWHERE = IA3Config(["q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "down_proj"], ["down_proj"])


def _vectors(config: IA3Config) -> dict[str, str]:
    """Module -> whether its input or its output is scaled, on a V3 of one dense layer and two."""
    model = tiny_steps.model_of(**tiny_steps.V3)
    adapters.attach(model, config)
    return {
        name.removeprefix("model.layers."): "input" if of_input else "output"
        for name, (_, _, of_input) in ia3.vectors(model, config).items()
    }


def test_a_plain_name_reaches_dense_and_shared_mlps() -> None:
    assert _vectors(IA3Config(["kv_b_proj", "down_proj"], ["down_proj"])) == {
        "0.self_attn.kv_b_proj": "output",
        "1.self_attn.kv_b_proj": "output",
        "2.self_attn.kv_b_proj": "output",
        "0.mlp.down_proj": "input",
        "1.mlp.shared_experts.down_proj": "input",
        "2.mlp.shared_experts.down_proj": "input",
    }


def test_a_map_may_be_scaled_in_one_layer_only() -> None:
    targets = ["layers.2.self_attn.o_proj", "0.mlp.down_proj", "shared_experts.down_proj"]
    found = _vectors(IA3Config(targets, ["0.mlp.down_proj"]))
    assert found["2.self_attn.o_proj"] == "output" and "1.self_attn.o_proj" not in found
    assert found["0.mlp.down_proj"] == "input"
    assert found["1.mlp.shared_experts.down_proj"] == "output"


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["experts.3.down_proj", "q_b_proj"], "'experts.3.down_proj'"),
        (["model.layers.1.mlp.experts.0.gate_proj"], "'model.layers.1.mlp.experts.0.gate_proj'"),
        (r".*\.mlp\.experts\.\d\.up_proj", r"'.*\\.mlp\\.experts\\.\\d\\.up_proj'"),
    ],
)
def test_routed_experts_are_refused_by_name(targets: Any, named: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        _vectors(IA3Config(targets, []))
    assert f"adapter.target_modules: got {named}, which names routed experts" in str(refusal.value)


@pytest.mark.parametrize(
    ("targets", "left"),
    [
        (["q_b_proj", "down_proj"], ["down_proj"]),
        (r".*\.(up|gate)_proj", ["gate_proj, up_proj"]),
        (["q_b_proj"], []),
        ("all-linear", []),
    ],
)
def test_it_is_said_that_routed_experts_are_left(targets: Any, left: list[str]) -> None:
    model = tiny_steps.model_of(**tiny_steps.V3)
    found = adapters.notes(model, IA3Config(targets, []))
    said = [f"IA3 leaves the routed experts' {names} as they are, as PEFT does" for names in left]
    assert found == said


@pytest.mark.parametrize(
    ("targets", "inputs", "message"),
    [
        (["q_b_proj", "nothing"], [], "adapter.target_modules: got 'nothing', which matches no"),
        (["gate"], [], "it is the experts' router, which has no adapter"),
        (["q_b_proj"], ["o_proj"], "adapter.feedforward_modules: got 'o_proj', expected one of"),
        (["q_b_proj"], ".*o_proj", "adapter.feedforward_modules: got '.*o_proj', which matches no"),
    ],
)
def test_what_matches_nothing_is_refused(targets: Any, inputs: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        _vectors(IA3Config(targets, inputs))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("targets", "inputs"),
    [
        (["k_proj", "v_proj"], []),
        (["k_proj", "mlp.down_proj"], ["mlp.down_proj"]),
        ("all-linear", ["down_proj"]),
    ],
)
def test_what_the_yaml_does_not_say_is_the_down_proj_among_the_targets(
    targets: Any, inputs: list[str]
) -> None:
    section = AdapterSection(peft_type="IA3", target_modules=targets)
    assert ia3.from_section(section).feedforward_modules == inputs


@pytest.mark.slow
def test_the_start_leaves_the_model_as_it_is() -> None:
    plain = tiny_steps.start(shape=tiny_steps.V3)
    scaled = tiny_steps.start(shape=tiny_steps.V3, adapter=EVERYWHERE, values=_ones_or_random)
    batch = tiny_steps.batch()
    assert float(plain.step(batch).sums["loss"]) == float(scaled.step(batch).sums["loss"])


def _ones_or_random(path: str, leaf: Any) -> np.ndarray:
    return np.ones(leaf.shape) if leaf.kind == "adapter" else tiny_steps.random_array(path, leaf)


RECIPES: dict[str, dict[str, Any]] = {
    "v3": {"shape": tiny_steps.V3, "adapter": EVERYWHERE},
    "qwen2": {
        "shape": {"model_type": "qwen2"},
        "adapter": IA3Config(
            ["q_proj", "v_proj", "layers.1.mlp.up_proj", "down_proj"], ["down_proj"]
        ),
    },
}


@cache
def _one_device(recipe: str) -> tiny_steps.Outcome:
    return tiny_steps.two_steps(tiny_steps.start(**RECIPES[recipe]))


@pytest.mark.parametrize("recipe", ["qwen2", pytest.param("v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "mesh",
    [pytest.param({"fsdp": 8}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_a_mesh_gives_the_result_of_one_device(recipe: str, mesh: dict[str, int]) -> None:
    run = tiny_steps.start(**RECIPES[recipe], mesh=mesh)
    tiny_steps.assert_same(tiny_steps.two_steps(run), _one_device(recipe))


@pytest.mark.slow
def test_experts_over_devices_give_the_result_of_one() -> None:
    run = tiny_steps.start(**RECIPES["v3"], mesh={"fsdp": 2, "tensor": 2, "expert": 2})
    tiny_steps.assert_same(tiny_steps.two_steps(run), _one_device("v3"))


@pytest.mark.parametrize("recipe", ["qwen2", pytest.param("v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["full", "dots", "names"])
def test_rematerialisation_changes_nothing(recipe: str, policy: str) -> None:
    run = tiny_steps.start(**RECIPES[recipe], training={"gradient_checkpointing": policy})
    tiny_steps.assert_same(tiny_steps.two_steps(run), _one_device(recipe))


@pytest.mark.slow
def test_portions_change_nothing() -> None:
    training = {"batch_size": 8, "gradient_accumulation_steps": 4}
    run = tiny_steps.start(**RECIPES["v3"], training=training)
    tiny_steps.assert_same(tiny_steps.two_steps(run), _one_device("v3"))


def test_the_merged_weight_alone_is_the_adapted_map() -> None:
    linear = Linear(5, 7, (None, None))
    linear.adapter = IA3(linear, read=[True], given=[True])
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(linear)
    random = jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 2.0, a.shape), a.dtype), state)
    linear = nnx.merge(graphdef, random)
    x = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    merged = product(x, linear.merged_weight(x.dtype))
    np.testing.assert_allclose(linear(x), merged, rtol=1e-5, atol=1e-6)
