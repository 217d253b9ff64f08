# SPDX-License-Identifier: Apache-2.0
"""From logical axes to devices: the mesh, and the sharding of every array.

In: the `mesh` section and leaves with logical axes. Out: a mesh and `NamedSharding`s, for concrete
and abstract trees alike. A dimension that its mesh axis does not divide is replicated, and the
report says so. Not done here: moving data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsjax.config import MeshSection
from dsjax.errors import ConfigError, raise_all
from dsjax.partition import Leaf

AXES = ("data", "fsdp", "tensor", "expert", "sequence")

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the rows of a batch are dealt."""

RULES = {
    "embed": "fsdp",
    "latent": "fsdp",
    "experts": "expert",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}
"""Logical axis -> mesh axis; every other axis is replicated."""


def make_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the devices; an axis of -1 takes what the others leave.

    Raises:
        ConfigError: more than one -1, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(section, axis) for axis in AXES]
    described = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise ConfigError(f"mesh: got {described}, expected at most one axis of -1")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ConfigError(
            f"mesh: got {described}, expected sizes whose product is the number of devices "
            f"({len(devices)}); set one axis to -1 to let it fill"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def complete_mesh(mesh: Mesh) -> Mesh:
    """A mesh of the caller's as the rules need it: all axes, those that it lacks of size 1.

    Raises:
        ConfigError: it has an axis of another name.
    """
    unknown = sorted(set(mesh.axis_names) - set(AXES))
    if unknown:
        raise ConfigError(f"mesh: got axes {unknown}, expected axes among {', '.join(AXES)}")
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    sizes = [mesh.shape.get(axis, 1) for axis in AXES]
    return Mesh(
        mesh.devices.transpose(order).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are dealt into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Refuse a batch that accumulation and devices do not divide."""
    parts = accumulation * batch_shards(mesh)
    if batch_size % parts:
        raise ConfigError(
            f"training.batch_size: got {batch_size}, expected a multiple of {parts} = "
            f"training.gradient_accumulation_steps ({accumulation}) x mesh.data x mesh.fsdp x "
            f"mesh.expert ({batch_shards(mesh)}); {math.ceil(batch_size / parts) * parts} would do"
        )


def check_experts(leaves: Mapping[str, Leaf], mesh: Mesh) -> None:
    """Refuse a mesh that does not divide the experts, or that shards experts which are not there.

    Raises:
        ConfigError: with a line for every axis.
    """
    experts = [leaf for leaf in leaves.values() if leaf.kind == "base" and "experts" in leaf.axes]
    if not experts and mesh.shape["expert"] > 1:
        raise ConfigError(
            f"mesh.expert: got {mesh.shape['expert']} for a model without experts, expected 1"
        )
    sizes = {
        (axis, size) for leaf in experts for axis, size in zip(leaf.axes, leaf.shape, strict=True)
    }
    raise_all(
        f"mesh.{RULES[axis]}: got {mesh.shape[RULES[axis]]}, expected a divisor of {field} ({size})"
        for axis, field in (("experts", "n_routed_experts"), ("mlp", "moe_intermediate_size"))
        for name, size in sorted(sizes, key=str)
        if name == axis and size % mesh.shape[RULES[axis]]
    )


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that lead with the rows of a batch: [B, T] and [B, T, D]."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(
    mesh: Mesh, batch_size: int, devices: Iterable[Any] | None = None
) -> tuple[int, ...]:
    """The rows of a batch that a process provides: those that its devices hold, sorted.

    Devices along the other axes hold the same rows, also where they belong to several processes;
    each of these then provides them.

    Args:
        mesh: the devices.
        batch_size: rows of the whole batch.
        devices: the process's; those of this one if None.
    """
    sharding = rows_sharding(mesh)
    held = sharding.devices_indices_map((batch_size,))
    mine = sharding.addressable_devices if devices is None else devices
    return tuple(sorted({row for device in mine for row in range(batch_size)[held[device][0]]}))


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def leaf_sharding(leaf: Leaf, mesh: Mesh) -> NamedSharding:
    """Sharding of one leaf by its logical axes."""
    spec = [
        RULES[axis] if axis in RULES and size % mesh.shape[RULES[axis]] == 0 else None
        for axis, size in zip(leaf.axes, leaf.shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*spec))


def leaf_shardings(leaves: Mapping[str, Leaf], mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every leaf by path."""
    return {path: leaf_sharding(leaf, mesh) for path, leaf in leaves.items()}


def undivided(leaves: Mapping[str, Leaf], mesh: Mesh) -> list[str]:
    """A line for every dimension that is replicated because its mesh axis does not divide it."""
    return [
        f"{path}: {axis} {size} is replicated, mesh.{RULES[axis]} {mesh.shape[RULES[axis]]} "
        "does not divide it"
        for path, leaf in leaves.items()
        for axis, size in zip(leaf.axes, leaf.shape, strict=True)
        if axis in RULES and size % mesh.shape[RULES[axis]]
    ]


def shardings_like(tree: Any, by_path: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings for a tree that holds dictionaries by parameter path, such as optimizer state.

    A leaf under a dictionary key that is a parameter's path is sharded like that parameter; every
    other leaf (a counter) is replicated.
    """

    def of(keys, _):
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        known = [by_path[name] for name in names if name in by_path]
        return known[0] if known else replicated(mesh)

    return jax.tree_util.tree_map_with_path(of, tree)
