# SPDX-License-Identifier: Apache-2.0
"""From logical axes to devices: the mesh, and the sharding of every array.

In: the `mesh` section and leaves with logical axes. Out: a mesh and `NamedSharding`s, for concrete
and abstract trees alike. A dimension that its mesh axis does not divide is replicated, and the
report says so. Not done here: moving data.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from dsjax.config import MeshSection
from dsjax.errors import ConfigError, raise_all
from dsjax.models.layers import Axes, Layout
from dsjax.partition import Leaf

AXES = ("data", "fsdp", "tensor", "expert", "sequence")

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the rows of a batch are dealt."""

RULES = {
    "experts": "expert",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}
"""Logical axis -> the mesh axis that divides it."""

WEIGHT_AXES = (("fsdp", "expert"), ("fsdp",), ("expert",))
"""Mesh axes that divide a matrix besides, for memory alone: the first group that fits is taken. It
divides the first dimension that it can, since XLA for CUDA would hold a transposed copy of a whole
stack if it had to gather another one; never the vocabulary, which logits are computed by."""


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
    for axis in ("tensor", "expert", "data"):
        size = math.gcd(max(getattr(section, axis), 1), left)
        left //= size
        words += f" mesh.{axis}={size}" if size > 1 else ""
    alone = f"mesh.fsdp={devices}"
    return f"mesh.fsdp={left}{words}, or {alone}" if words else alone


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


def portions(asked: int | Literal["auto"], batch_size: int, mesh: Mesh) -> int:
    """In how many portions a batch is computed; `auto` leaves a row at a time to each device."""
    return max(batch_size // batch_shards(mesh), 1) if asked == "auto" else asked


def microbatches(x: Shaped[Array, "B T"], count: int, mesh: Mesh) -> Shaped[Array, "count b T"]:
    """Deal the rows of a batch into `count` portions; each device deals out rows of its own."""
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
        f"mesh.{divisor}: got {mesh.shape[divisor]}, expected a divisor of {field} ({size})"
        for axis, divisor, field in (
            ("experts", "expert", "n_routed_experts"),
            ("mlp", "tensor", "moe_intermediate_size"),
        )
        for name, size in sorted(sizes, key=str)
        if name == axis and size % mesh.shape[divisor]
    )


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that lead with the rows of a batch: [B, T] and [B, T, D]."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def make_layout(mesh: Mesh) -> Layout:
    """What a model has to know of the mesh."""
    return Layout(rows_sharding(mesh), partial(_gather, mesh))


def _gather(mesh: Mesh, x: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """Undo the division by WEIGHT_AXES; gradients are summed into the divided form again."""
    ruled, placed = _ruled(x.shape, axes, mesh), _placed(x.shape, axes, mesh)
    if _size([axis for extra in placed for axis in extra], mesh) == 1 or ruled == placed:
        return x
    return _gathered(x, _sharding(ruled, mesh), _sharding(placed, mesh), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(
    x: jax.Array, whole: NamedSharding, divided: NamedSharding, dtype: jnp.dtype
) -> jax.Array:
    dim = next(i for i, axes in enumerate(divided.spec) if axes != whole.spec[i])
    kept, held = (_names(sharding.spec[dim]) for sharding in (whole, divided))

    # The barrier keeps XLA from gathering the slice of a stack before its layer's axis is dropped,
    # in a layout for which it would copy the whole stack.
    def gather(part: jax.Array) -> jax.Array:
        part = jax.lax.optimization_barrier(part)
        return jax.lax.all_gather(part, held[len(kept) :], axis=dim, tiled=True)

    gathered = jax.shard_map(
        gather, mesh=whole.mesh, in_specs=divided.spec, out_specs=whole.spec, check_vma=False
    )(x.astype(dtype))
    # Wide again, though no digit is: devices then sum its gradient in x's dtype. XLA drops both
    # this cast and the one that follows where the array is used.
    return gathered.astype(x.dtype)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _gathered_forward(x: jax.Array, whole: NamedSharding, divided: NamedSharding, dtype: jnp.dtype):
    return _gathered(x, whole, divided, dtype), None


def _gathered_backward(
    whole: NamedSharding, divided: NamedSharding, dtype: jnp.dtype, _: None, grad: jax.Array
):
    # First summed, then divided: asked for the latter alone, XLA for TPU weaves both into a loop
    # around the product, which takes long to compile. It makes one reduce-scatter of both for few
    # chips only: over 4 x 4 of them it sums whole gradients, as it does for a `psum_scatter`.
    grad = jax.lax.with_sharding_constraint(grad, whole)
    return (jax.lax.with_sharding_constraint(grad, divided),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


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
    return _sharding(_placed(leaf.shape, leaf.axes, mesh), mesh)


def computed_sharding(leaf: Leaf, mesh: Mesh) -> NamedSharding:
    """Sharding of one leaf while it is computed with, once what WEIGHT_AXES divide is gathered."""
    return _sharding(_ruled(leaf.shape, leaf.axes, mesh), mesh)


Placed = list[tuple[str, ...]]
"""For every dimension the mesh axes that divide it."""


def _sharding(placed: Placed, mesh: Mesh) -> NamedSharding:
    parts = [axes[0] if len(axes) == 1 else axes or None for axes in placed]
    return NamedSharding(mesh, PartitionSpec(*parts))


def _ruled(shape: Sequence[int], axes: Axes, mesh: Mesh) -> Placed:
    """What RULES say alone."""
    return [
        (RULES[axis],) if axis in RULES and size % mesh.shape[RULES[axis]] == 0 else ()
        for axis, size in zip(axes, shape, strict=True)
    ]


def _placed(shape: Sequence[int], axes: Axes, mesh: Mesh) -> Placed:
    """What RULES say, and WEIGHT_AXES for a matrix."""
    placed = _ruled(shape, axes, mesh)
    for free in _free_groups(axes):
        for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            if axis not in ("layers", "vocab") and size % _size(placed[i] + free, mesh) == 0:
                placed[i] += free
                return placed
    return placed


def _free_groups(axes: Axes) -> list[tuple[str, ...]]:
    """The groups of WEIGHT_AXES for a matrix, without the axis that experts take."""
    if sum(axis != "layers" for axis in axes) < 2:
        return []
    taken = RULES["experts"] if "experts" in axes else ""
    groups = [tuple(axis for axis in group if axis != taken) for group in WEIGHT_AXES]
    return [group for group in groups if group]


def _size(axes: Sequence[str], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def leaf_shardings(leaves: Mapping[str, Leaf], mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every leaf by path."""
    return {path: leaf_sharding(leaf, mesh) for path, leaf in leaves.items()}


def undivided(leaves: Mapping[str, Leaf], mesh: Mesh) -> list[str]:
    """A line for everything that is replicated because mesh axes do not divide it."""
    lines = []
    for path, leaf in leaves.items():
        placed = _placed(leaf.shape, leaf.axes, mesh)
        lines += [
            f"{path}: {axis} {size} is replicated, mesh.{RULES[axis]} {mesh.shape[RULES[axis]]} "
            "does not divide it"
            for axis, size, axes in zip(leaf.axes, leaf.shape, placed, strict=True)
            if axis in RULES and RULES[axis] not in axes
        ]
        held = {name for axes in placed for name in axes}
        wanted = next(iter(_free_groups(leaf.axes)), ())
        left = [name for name in wanted if name not in held and mesh.shape[name] > 1]
        if left:
            shape = " x ".join(map(str, leaf.shape))
            named = " x ".join(f"mesh.{name} {mesh.shape[name]}" for name in wanted)
            lines.append(
                f"{path}: {shape} is held {_size(left, mesh)} times, {named} divides none of its "
                "dimensions"
            )
    return lines


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
