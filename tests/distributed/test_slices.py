# SPDX-License-Identifier: Apache-2.0
"""Several TPU slices: which axes cross them, and which meshes are refused."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.errors import ConfigError

SLICES = [("v5e:4x4", 2), ("v5p:2x2x2", 2), ("v5e:2x2", 4), ("v5p:2x2x1", 3)]


def _slices(name: str, count: int) -> list[Any]:
    """Chips of several TPU slices, as their compiler knows them."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=count)
    return list(found.devices)


def _lie_within(mesh: jax.sharding.Mesh) -> set[str]:
    """The axes along which no two chips are of different slices."""
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert len({device.id for device in mesh.devices.flat}) == mesh.size
    return {
        axis
        for dim, axis in enumerate(mesh.axis_names)
        if (slices == slices.take([0], axis=dim)).all()
    }


@pytest.mark.parametrize(("name", "count"), SLICES)
def test_only_data_crosses_tpu_slices(name: str, count: int) -> None:
    devices = _slices(name, count)
    inside = {"fsdp", "tensor", "expert", "sequence"}
    meshes: list[dict[str, Any]] = [
        {"data": count},
        {"data": count, "tensor": 2},
        {"data": -1, "fsdp": 2},
    ]
    for axes in meshes:
        mesh = make_mesh(MeshSection(**axes), devices)
        assert mesh.size == len(devices) and _lie_within(mesh) == inside
        # Rows of a slice lie together: its hosts read no others.
        first = [d.slice_index for d in mesh.devices.reshape(mesh.shape["data"], -1)[:, 0]]
        assert first == sorted(first)


@pytest.mark.parametrize(("name", "count"), SLICES)
def test_weights_cross_tpu_slices_where_that_is_written(name: str, count: int) -> None:
    devices = _slices(name, count)
    mesh = make_mesh(MeshSection(fsdp=len(devices)), devices)
    assert _lie_within(mesh) == {"data", "tensor", "expert", "sequence"}
    message = (
        f"mesh.data: got 1 for {count} TPU slices of {len(devices) // count} chips, expected a "
        f"multiple of {count}: .*set mesh.data={count}, or, .* mesh.fsdp to a multiple of {count} a"
    )
    refused: list[dict[str, Any]] = [{}, {"fsdp": 1, "tensor": -1}, {"tensor": 2}]
    for axes in refused:
        with pytest.raises(ConfigError, match=message):
            make_mesh(MeshSection(**axes), devices)


def test_slices_of_different_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="mesh: got TPU slices of 4, 3 chips, expected slices of"):
        make_mesh(MeshSection(data=7, fsdp=1), _slices("v5e:2x2", 2)[:7])


def test_a_slice_alone_is_placed_as_ever() -> None:
    devices = _slices("v5e:4x4", 2)[:16]
    mesh = make_mesh(MeshSection(), devices)
    assert dict(mesh.shape)["fsdp"] == 16 and {d.slice_index for d in mesh.devices.flat} == {0}
