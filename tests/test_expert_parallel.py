# SPDX-License-Identifier: Apache-2.0
"""Experts over many devices compute what one device computes, whatever the routing."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import in_memory
import jax
import numpy as np
import pytest

from dsjax.config import MeshSection
from dsjax.errors import ConfigError
from dsjax.partition import Leaf
from dsjax.sharding import check_experts, make_mesh

MESHES = {
    "expert 8": {"expert": 8},
    "expert 4, fsdp 2": {"expert": 4, "fsdp": 2},
    "expert 2, tensor 2, data 2": {"expert": 2, "tensor": 2, "data": 2},
}

Outcome = tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]


def _crowded(path: str, leaf: Leaf) -> np.ndarray:
    """A correction bias that sends every token to the same experts, all of one device."""
    values = in_memory.random_array(path, leaf)
    if path.endswith("e_score_correction_bias"):
        values[:, 4:8] += 100
    return values


ROUTINGS = {"scattered": in_memory.random_array, "crowded": _crowded}


def _two_steps(routing: str, mesh: Mapping[str, int] | None) -> Outcome:
    """Loss and gradients of the first step, and the trained arrays after the second."""
    run = in_memory.start(in_memory.V3, mesh=mesh, values=ROUTINGS[routing])
    report = run.step(in_memory.batch())
    gradients = run.gradients()
    run.step(in_memory.batch(seed=1))
    return float(report.sums.loss), gradients, run.trainable()


@functools.cache
def _one_device(routing: str) -> Outcome:
    return _two_steps(routing, None)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_result_of_one_device(mesh: str, routing: str) -> None:
    loss, gradients, trained = _two_steps(routing, MESHES[mesh])

    expected_loss, expected_gradients, expected_trained = _one_device(routing)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert set(gradients) == set(expected_gradients)
    for path, gradient in expected_gradients.items():
        assert np.linalg.norm(gradient) > 0, path
        assert in_memory.distance(gradients[path], gradient) < 1e-5, path
        assert in_memory.distance(trained[path], expected_trained[path]) < 1e-5, path


def test_experts_are_held_in_parts() -> None:
    run = in_memory.start(in_memory.V3, mesh={"expert": 4, "tensor": 2})
    weight = run.state.trainable["model.layers.mlp.experts.gate_proj.weight"]
    assert weight.shape == (2, 8, 16, 32)
    assert {shard.data.shape for shard in weight.addressable_shards} == {(2, 2, 8, 32)}


@pytest.mark.parametrize(
    ("shape", "mesh", "said"),
    [
        ({}, {"expert": 3}, r"mesh.expert: got 3, expected a divisor of n_routed_experts \(8\)"),
        ({"moe_intermediate_size": 9}, {"tensor": 2}, r"mesh.tensor: got 2, .* \(9\)"),
        ({"model_type": "llama"}, {"expert": 2}, "mesh.expert: got 2 for a model without experts"),
    ],
)
def test_a_mesh_that_does_not_divide_the_experts(
    shape: dict[str, Any], mesh: dict[str, int], said: str
) -> None:
    run = in_memory.start(in_memory.V3 | shape)
    section = MeshSection(**({"fsdp": 1} | mesh))
    devices = jax.devices()[: math.prod(mesh.values())]
    with pytest.raises(ConfigError, match=said):
        check_experts(run.config.partition.leaves, make_mesh(section, devices))
