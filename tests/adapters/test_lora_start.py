# SPDX-License-Identifier: Apache-2.0
"""LoRA's first values that are parts of the weight: what they are, that they stay, what counts."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from flax import nnx

from dsjax import adapters
from dsjax.adapters import lora_start
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.lora_plain import plain_arrays, plain_config
from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import leaf_shardings
from dsjax.errors import ConfigError
from dsjax.training.partition import make_partition, report, unflatten

UNEVEN = replace(tiny_steps.UNEVEN_EXPERTS, init_lora_weights="pissa")
KEPT = ("initial_lora_A", "initial_lora_B")


def _updates(arrays: dict[str, Any], path: str) -> np.ndarray:
    """Product of the first values of a slot, in float64."""
    b, a = (np.float64(arrays[f"{path}.adapter.{name}"]) for name in ("lora_B", "lora_A"))
    return b @ a


def _first_values(
    shape: dict[str, Any], spec: LoraConfig, frozen: dict[str, Any], **mesh: int
) -> dict[str, jax.Array]:
    model = tiny_steps.model_of(**shape)
    adapters.attach(model, spec)
    leaves = make_partition(model).leaves
    devices = make_mesh(MeshSection(**({"fsdp": 1} | mesh)), jax.devices()[: 8 if mesh else 1])
    shardings = leaf_shardings(leaves, devices)
    base = {path: jax.device_put(np.asarray(a), shardings[path]) for path, a in frozen.items()}
    return adapters.initial_params(model, spec, leaves, shardings, 0, base)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora"])
def test_first_values_are_the_largest_part_of_each_layer_and_expert(start: str) -> None:
    frozen = tiny_steps.start(tiny_steps.V3, UNEVEN).frozen
    spec = replace(UNEVEN, init_lora_weights=start)
    values = _first_values(tiny_steps.V3, spec, frozen)
    path = "model.layers.mlp.experts.gate_proj"
    found, weights = _updates(values, path), np.float64(frozen[f"{path}.weight"])
    ranks = np.zeros((2, 8), int)
    ranks[0, [2, 5]], ranks[1, [2, 5]] = 3, 2
    scaling = np.asarray(frozen[f"{path}.adapter.scaling"])
    for at in np.ndindex(2, 8):
        own = ranks[at]
        if start == "olora":
            q, r = np.linalg.qr(weights[at])
            expected = q[:, :own] @ r[:own]
        else:
            u, s, v = np.linalg.svd(weights[at])
            expected = u[:, :own] * s[:own] @ v[:own] / (scaling[at] if own else 1)
        if "niter" in start:  # it mixes two singular values that are near: as much is left
            left = np.linalg.norm(weights[at] - scaling[at] * found[at])
            assert left <= 1.001 * np.linalg.norm(s[own:])
        else:
            np.testing.assert_allclose(found[at], expected, rtol=0, atol=1e-5)
    for name in ("lora_A", "lora_B"):
        first = np.asarray(values[f"{path}.adapter.{name}"])
        np.testing.assert_array_equal(first, values[f"{path}.adapter.initial_{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_first_values_do_not_depend_on_the_mesh(start: str) -> None:
    frozen = tiny_steps.start(tiny_steps.V3, UNEVEN).frozen
    spec = replace(UNEVEN, init_lora_weights=start)
    alone = _first_values(tiny_steps.V3, spec, frozen)
    divided = _first_values(tiny_steps.V3, spec, frozen, fsdp=2, expert=2, tensor=2)
    for path in ("model.layers.mlp.experts.down_proj", "model.layers.self_attn.o_proj"):
        np.testing.assert_allclose(
            _updates(divided, path), _updates(alone, path), rtol=0, atol=1e-5
        )


def test_what_is_kept_does_not_train_and_has_no_moments() -> None:
    run = tiny_steps.start(tiny_steps.V3, UNEVEN, optimizer={"weight_decay": 0.5})
    before = run.trainable()
    run.step(tiny_steps.batch())
    after, moments = run.trainable(), run.state.opt_state[0].mu
    kept = [path for path in before if path.endswith(KEPT)]
    assert len(kept) == len(before) // 2 and not set(kept) & set(moments)
    for path, array in before.items():
        assert np.array_equal(array, after[path]) == (path in kept), path
    plain = make_partition(_attached(replace(UNEVEN, init_lora_weights=True)))
    assert run.config.partition.counts() == plain.counts()
    assert report(run.config.partition) == report(plain)


def _attached(spec: LoraConfig) -> nnx.Module:
    model = tiny_steps.model_of(**tiny_steps.V3)
    adapters.attach(model, spec)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_steps_on_a_mesh_are_those_of_one_device(fields: dict[str, Any]) -> None:
    spec = replace(UNEVEN, **fields)
    expected = tiny_steps.two_steps(tiny_steps.start(tiny_steps.V3, spec))
    mesh = {"fsdp": 2, "expert": 2, "tensor": 2}
    found = tiny_steps.two_steps(tiny_steps.start(tiny_steps.V3, spec, mesh=mesh))
    tiny_steps.assert_same(found, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_plain_lora_of_twice_the_rank_gives_the_same_logits(rslora: bool) -> None:
    spec = replace(UNEVEN, use_rslora=rslora)
    run = tiny_steps.start(tiny_steps.V3, spec)
    plain = plain_config(spec)
    model = _attached(plain)
    arrays = plain_arrays(_attached(spec), run.state.trainable)
    scalings = {
        path: np.float32(_buffer(model, path)).reshape(leaf.shape)
        for path, leaf in make_partition(model).leaves.items()
        if leaf.kind == "buffer"
    }
    ids = tiny_steps.batch().input_ids
    ours = tiny_steps.full_model(run)(ids)
    theirs = unflatten(nnx.graphdef(model), {**run.frozen, **scalings, **arrays})(ids)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    assert [plain.r, *plain.rank_pattern.values()] == [4, 6]


def _buffer(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = getattr(model, part)
    return model.get_metadata()["values"]


def test_more_rank_than_a_weight_has_is_refused() -> None:
    spec = LoraConfig(r=13, lora_alpha=1, target_modules=["q_b_proj"], init_lora_weights="olora")
    with pytest.raises(
        ConfigError, match=r"adapter.r: got 13 .*=olora, expected at most 12, the ran"
    ):
        _attached(spec)
    _attached(replace(spec, rank_pattern={"q_b_proj": 12}))


def test_a_normal_start_has_the_deviation_of_peft() -> None:
    spec = replace(UNEVEN, init_lora_weights="gaussian", r=16, rank_pattern={})
    values = _first_values(tiny_steps.V3, spec, tiny_steps.start(tiny_steps.V3, spec).frozen)
    drawn = np.asarray(values["model.layers.self_attn.o_proj.adapter.lora_A"])
    assert not np.any(values["model.layers.self_attn.o_proj.adapter.lora_B"])
    assert abs(drawn.std() * 16 - 1) < 0.1 and not lora_start.is_of_weight("gaussian")
    assert jnp.isfinite(drawn).all()
