# SPDX-License-Identifier: Apache-2.0
"""DoRA: rows of W + scaling * B A at the lengths that are trained, of routed experts too."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from flax import nnx

from dsjax import adapters
from dsjax.adapters import lora
from dsjax.adapters.dora import MAGNITUDE, length_ratio, lengths, row_norms
from dsjax.adapters.lora import LoraConfig
from dsjax.errors import ConfigError
from dsjax.models import build
from dsjax.training.partition import make_partition, unflatten

UNEVEN = replace(tiny_steps.UNEVEN_EXPERTS, use_dora=True)
"""Layers and experts differ in rank, and some have no adapter."""

BIASES = {"model_type": "qwen2"}
LAYERS = LoraConfig(
    r=3,
    lora_alpha=5,
    target_modules=["q_proj", "v_proj", "down_proj"],
    layers_to_transform=[1],
    use_dora=True,
)


def _logits(graphdef: Any, params: dict[str, Any], ids: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, i: unflatten(graphdef, p)(i))(params, ids))


def _plain_params(run: tiny_steps.Run) -> dict[str, Any]:
    """The base with m / |V| * V in place of each adapted row of W, computed in float64."""
    params = {path: np.asarray(a) for path, a in (run.frozen | run.state.trainable).items()}
    for path in [path for path in params if path.endswith(f".adapter.{MAGNITUDE}")]:
        owner = path.removesuffix(f".adapter.{MAGNITUDE}")
        a, b, scaling, length = (
            np.float64(params[f"{owner}.adapter.{name}"])
            for name in ("lora_A", "lora_B", "scaling", MAGNITUDE)
        )
        weight = np.float64(params[f"{owner}.weight"])
        moved = weight + scaling[..., None, None] * (b @ a)
        moved *= (length / np.linalg.norm(moved, axis=-1))[..., None]
        adapted = (scaling != 0)[..., None, None]
        params[f"{owner}.weight"] = np.where(adapted, moved, weight).astype(np.float32)
    return {path: array for path, array in params.items() if ".adapter." not in path}


@pytest.mark.parametrize(
    ("shape", "spec"), [(tiny_steps.V3, UNEVEN), (BIASES, LAYERS)], ids=["experts", "biases"]
)
def test_the_model_is_that_of_the_weights_it_stands_for(
    shape: dict[str, Any], spec: LoraConfig
) -> None:
    run = tiny_steps.start(shape, spec)
    plain = nnx.graphdef(build(tiny_steps.SHAPE | shape, "float32"))
    ids = tiny_steps.batch().input_ids
    both = run.frozen | run.state.trainable
    ours = _logits(run.config.partition.graphdef, both, ids)
    np.testing.assert_allclose(ours, _logits(plain, _plain_params(run), ids), rtol=0, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "spec", "mesh"),
    [
        (tiny_steps.V3, UNEVEN, {"fsdp": 2, "expert": 2, "tensor": 2}),
        (BIASES, replace(LAYERS, lora_dropout=0.3), {"fsdp": 4, "tensor": 2}),
    ],
    ids=["experts", "biases and dropout"],
)
def test_steps_on_a_mesh_are_those_of_one_device(
    shape: dict[str, Any], spec: LoraConfig, mesh: dict[str, int]
) -> None:
    expected = tiny_steps.two_steps(tiny_steps.start(shape, spec))
    found = tiny_steps.two_steps(tiny_steps.start(shape, spec, mesh=mesh))
    tiny_steps.assert_same(found, expected)


def test_what_has_no_adapter_keeps_its_length_whatever_stands_there() -> None:
    run = tiny_steps.start(BIASES, LAYERS)
    before = tiny_steps.full_model(run)(tiny_steps.batch().input_ids)
    changed = {
        path: array.at[0].set(7.0) if path.endswith(MAGNITUDE) else array
        for path, array in run.state.trainable.items()
    }
    after = unflatten(run.config.partition.graphdef, {**run.frozen, **changed})
    np.testing.assert_array_equal(after(tiny_steps.batch().input_ids), before)
    counts = {path: leaf.count for path, leaf in run.config.partition.leaves.items()}
    assert counts[f"model.layers.self_attn.v_proj.adapter.{MAGNITUDE}"] == 16


def test_norms_have_no_gradient_and_rows_of_zeros_no_length() -> None:
    rng = np.random.default_rng(0)
    weight, a, b = (jnp.float32(rng.normal(size=s)) for s in ((2, 5, 7), (2, 3, 7), (2, 5, 3)))
    scaling, b = jnp.float32([0.5, 2.0]), b.at[0, 4].set(0)
    weight = weight.at[0, 4].set(0)
    norms = row_norms(weight, a, b, scaling)
    moved = np.float64(weight) + np.float64(scaling)[:, None, None] * (np.float64(b) @ a)
    np.testing.assert_allclose(norms, np.linalg.norm(moved, axis=-1), rtol=1e-6)
    ratio = length_ratio(lengths(weight), norms, jnp.ones((2, 1), bool))
    assert float(ratio[0, 4]) == 1 and np.isfinite(ratio).all()
    slopes = jax.grad(lambda *x: row_norms(*x).sum(), argnums=(0, 1, 2, 3))(weight, a, b, scaling)
    assert not any(np.any(slope) for slope in slopes[:3])


def test_first_lengths_are_those_of_the_rows_of_each_layer() -> None:
    run = tiny_steps.start(tiny_steps.V3, UNEVEN)
    leaves = run.config.partition.leaves
    model = tiny_steps.model_of(**tiny_steps.V3)
    adapters.attach(model, UNEVEN)
    for path in [path for path in leaves if path.endswith(MAGNITUDE)]:
        (name,) = lora.initial_reads(path)
        weight = run.frozen[name]
        first = lora.initial(path, leaves[path], model, jax.random.key(0), {name: weight})
        assert first.shape == leaves[path].shape
        np.testing.assert_allclose(first, np.linalg.norm(np.asarray(weight), axis=-1), rtol=1e-6)


@pytest.mark.parametrize("targets", [["o_proj", "down_proj"], ["experts.1.gate_proj"]])
def test_what_peft_has_no_dora_for_is_refused_before_training(targets: list[str]) -> None:
    spec = LoraConfig(r=2, lora_alpha=4, target_modules=targets, use_dora=True)
    model = tiny_steps.model_of(**tiny_steps.V3)
    adapters.attach(model, spec)
    assert make_partition(model).trainable
    with pytest.raises(ConfigError, match=r"export.format: got peft"):
        adapters.check_form(model, spec, "peft", "export.format")
    adapters.check_form(model, spec, "merged", "export.format")
