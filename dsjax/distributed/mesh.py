# SPDX-License-Identifier: Apache-2.0
"""The mesh of a run's devices, and how the rows of a batch are dealt over it.

In: the `mesh` section. Out: a `Mesh` with all axes, the sharding of a batch, and which rows a
process provides. Not done here: how parameters are divided (`sharding`).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from dsjax.config import MeshSection
from dsjax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "expert", "sequence")

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the rows of a batch are dealt."""

TOKENS_AT_A_TIME = 2048
"""Of a device, as `training.gradient_accumulation_steps: auto` splits a batch: enough for its
matrix products to be large; more of them take memory for more activations."""


def make_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the devices; an axis of -1 takes what the others leave.

    Of several TPU slices, `data` crosses the network between them, and `fsdp` where it is written
    as a number; all other axes lie within a slice.

    Raises:
        ConfigError: more than one -1, sizes that do not multiply to the number of devices, or axes
            that would have to lie across slices.
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
            f"({len(devices)}); set one axis to -1 to let it fill, or take "
            f"{_working_meshes(section, len(devices))}"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    across = _across_slices(section, sizes, devices)
    # An axis of 8 on a slice of 4 x 4 x 4 chips takes a part of a side.
    if math.prod(across) == 1:
        placed = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        within = [size // count for size, count in zip(sizes, across, strict=True)]
        placed = create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _across_slices(
    section: MeshSection, sizes: Sequence[int], devices: Sequence[Any]
) -> tuple[int, ...]:
    """Into how many parts each axis is divided by the network between TPU slices."""
    # Only a TPU's: other devices have hosts, which are in the order of their numbers anyway.
    tpus = [device for device in devices if device.platform == "tpu"]
    chips = Counter(getattr(device, "slice_index", 0) for device in tpus)
    if len(chips) < 2:
        return (1,) * len(AXES)
    if len(set(chips.values())) > 1:
        counts = ", ".join(str(chips[index]) for index in sorted(chips))
        raise ConfigError(f"mesh: got TPU slices of {counts} chips, expected slices of one size")
    slices, (data, fsdp, *_) = len(chips), sizes
    copies = math.gcd(data, slices)
    shards = slices // copies
    if shards > 1 and (section.fsdp == -1 or fsdp % shards):
        chip_count = len(tpus) // slices
        raise ConfigError(
            f"mesh.data: got {data} for {slices} TPU slices of {chip_count} chips, expected a "
            f"multiple of {slices}: gradients alone should cross the network between slices; set "
            f"mesh.data={slices}, or, for a model that no slice holds, mesh.fsdp to a multiple of "
            f"{shards} as a number (not -1): its weights then cross it at every layer, slowly"
        )
    return (copies, shards, *(1 for _ in AXES[2:]))


def _working_meshes(section: MeshSection, devices: int) -> str:
    """Meshes for a number of devices: fsdp alone, and with what divides it of the other axes."""
    left, words = devices, ""
    for axis in ("tensor", "expert", "sequence", "data"):
        size = math.gcd(max(getattr(section, axis), 1), left)
        left //= size
        words += f" mesh.{axis}={size}" if size > 1 else ""
    alone = f"mesh.fsdp={devices}"
    return f"mesh.fsdp={left}{words}, or {alone}" if words else alone


def normalize_mesh(mesh: Mesh) -> Mesh:
    """Complete a mesh of the caller's for the rules: all axes, those that it lacks of size 1.

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
    """Return the number of parts that the rows of a batch are dealt into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def num_microbatches(asked: int | Literal["auto"], batch_size: int, length: int, mesh: Mesh) -> int:
    """Into how many microbatches a batch is split.

    Args:
        asked: `training.gradient_accumulation_steps`. auto: as few as leave `TOKENS_AT_A_TIME` or
            fewer to each device, or a row that is longer; so shorter rows take no more memory.
        batch_size: rows of a batch, over all devices.
        length: tokens of a row.
        mesh: the devices.
    """
    if asked != "auto":
        return asked
    rows = max(batch_size // batch_shards(mesh), 1)
    most = max(TOKENS_AT_A_TIME * mesh.shape["sequence"] // length, 1)
    return rows // max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)


def microbatches(x: Shaped[Array, "B T"], count: int, mesh: Mesh) -> Shaped[Array, "count b T"]:
    """Deal the rows of a batch into `count` microbatches; each device deals out its own rows."""
    shards = batch_shards(mesh)
    x = x.reshape(shards, count, -1, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(count, -1, *x.shape[3:])


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Refuse a batch that accumulation and devices do not divide."""
    parts = accumulation * batch_shards(mesh)
    if batch_size % parts:
        raise ConfigError(
            f"training.batch_size: got {batch_size}, expected a multiple of {parts} = "
            f"training.gradient_accumulation_steps ({accumulation}) x mesh.data x mesh.fsdp x "
            f"mesh.expert ({batch_shards(mesh)}); {math.ceil(batch_size / parts) * parts} would do"
        )


def length_multiple(mesh: Mesh) -> int:
    """Return what divides the number of a row's tokens: each part of a row has two halves."""
    return 2 * mesh.shape["sequence"] if mesh.shape["sequence"] > 1 else 1


def check_length(max_length: int, mesh: Mesh) -> None:
    """Refuse rows that the devices do not divide along their tokens.

    Raises:
        ConfigError: `data.max_length` is no multiple of twice `mesh.sequence`.
    """
    multiple = length_multiple(mesh)
    if max_length % multiple:
        raise ConfigError(
            f"data.max_length: got {max_length}, expected a multiple of {multiple} = 2 x "
            f"mesh.sequence ({mesh.shape['sequence']}); "
            f"{math.ceil(max_length / multiple) * multiple} would do"
        )


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch as a step is given it: rows are dealt, each of them lies whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(
    mesh: Mesh, batch_size: int, devices: Iterable[Any] | None = None
) -> tuple[int, ...]:
    """List the rows of a batch that a process provides: those that its devices hold, sorted.

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
