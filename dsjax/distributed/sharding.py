# SPDX-License-Identifier: Apache-2.0
"""From logical axes to devices: the mesh, and the sharding of every array.

In: the `mesh` section and leaves with logical axes. Out: a mesh and `NamedSharding`s, for concrete
and abstract trees alike. A dimension that its mesh axis does not divide is replicated, and the
report says so. Not done here: moving data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.distributed.mesh import AXES, BATCH_AXES, replicated
from dsjax.errors import ConfigError, raise_all

Axes = tuple[str | None, ...]
"""Logical axis of every dimension of a parameter."""


class Layout(NamedTuple):
    """How arrays lie on a mesh.

    Attributes:
        rows: sharding of activations [B, T, ...]: rows, and their tokens in contiguous parts.
        gather: (a parameter of one layer, its axes, the dtype it is computed with in) -> the same
            numbers in the parameter's own dtype, rounded to that one and brought together where
            the parameter is divided for memory alone.
    """

    rows: NamedSharding
    gather: Callable[[jax.Array, Axes, jnp.dtype], jax.Array]

    @property
    def parts(self) -> tuple[str, ...]:
        """The mesh axes that divide what leads with parts of rows (`sequence.split_rows`)."""
        return ("sequence", *BATCH_AXES)

    def axis(self, name: str) -> str:
        """Name the mesh axis that divides a logical one, for collectives in a `shard_map`."""
        return RULES[name]

    def shards(self, name: str) -> int:
        """Into how many parts a logical axis is divided."""
        return self.rows.mesh.shape[RULES[name]]

    def spec(self, *axes: str | None, leading_parts: bool = False) -> PartitionSpec:
        """How `shard_map` divides an array, by its logical axes, all of which have to divide.

        Args:
            axes: of its dimensions, but for the rows.
            leading_parts: whether rows, or parts of rows, stand before these.
        """
        parts = (self.parts,) if leading_parts else ()
        return PartitionSpec(*parts, *(RULES.get(axis) if axis else None for axis in axes))


Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Leaf:
    """One array of the model.

    Attributes:
        shape: of the whole array; stacks lead with the layers.
        axes: logical axis of every dimension.
        dtype: what it is held in.
        kind: `base`, `adapter` or `buffer`.
        count: parameters in it, without the padding of unequal adapter ranks.
        pinned: whether no other dtype will do.
        quantized: whether it is one of the arrays that hold a matrix in fewer bits.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: jnp.dtype
    kind: str
    count: int
    pinned: bool = False
    quantized: bool = False


def has_experts(leaves: Mapping[str, Leaf]) -> bool:
    """Whether a model has routed experts."""
    return any("experts" in leaf.axes for leaf in leaves.values())


RULES = {
    "experts": "expert",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}
"""Logical axis -> the mesh axis that shards it. No rule shards the others (`embed`, `layers`,
None), but `FSDP_AXES` may. Models name the axes of their parameters in their constructors."""

WHOLE = "whole_matrix"
"""Logical axis of an array by whose parts no part of a matrix can be decoded alone."""

FSDP_AXES = (
    ("fsdp", "expert", "sequence"),
    ("fsdp", "expert"),
    ("fsdp", "sequence"),
    ("expert", "sequence"),
    ("fsdp",),
    ("expert",),
    ("sequence",),
)
"""Mesh axes that shard a matrix as well, only to save memory: the first group that fits is taken.
It shards the first dimension that it can, since XLA for CUDA would hold a transposed copy of a
whole stack if it had to gather another one; never the vocabulary, which logits are computed by."""


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
    if mesh.shape["tensor"] > 1 and any(WHOLE in leaf.axes for leaf in experts):
        raise ConfigError(
            f"mesh.tensor: got {mesh.shape['tensor']}, expected 1: a part of an expert's matrix "
            "cannot be decoded alone; use mesh.expert, or another model.quantization"
        )
    raise_all(
        f"mesh.{divisor}: got {mesh.shape[divisor]}, expected a divisor of {field} ({size})"
        for axis, divisor, field in (
            ("experts", "expert", "n_routed_experts"),
            ("mlp", "tensor", "moe_intermediate_size"),
        )
        for name, size in sorted(sizes, key=str)
        if name == axis and size % mesh.shape[divisor]
    )


def make_layout(mesh: Mesh) -> Layout:
    """Return what a model has to know of the mesh."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))
    return Layout(rows, partial(_gather, mesh))


def _gather(mesh: Mesh, x: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """Undo the division by FSDP_AXES; gradients are summed into the divided form again."""
    computed, stored = _compute_axes(x.shape, axes, mesh), _storage_axes(x.shape, axes, mesh)
    if _size([axis for extra in stored for axis in extra], mesh) == 1 or computed == stored:
        return x
    return _gathered(x, _sharding(computed, mesh), _sharding(stored, mesh), dtype)


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
    """Return the mesh axes of one dimension of a PartitionSpec."""
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


def leaf_sharding(leaf: Leaf, mesh: Mesh) -> NamedSharding:
    """Sharding of one leaf by its logical axes."""
    return _sharding(_storage_axes(leaf.shape, leaf.axes, mesh), mesh)


def computed_sharding(leaf: Leaf, mesh: Mesh) -> NamedSharding:
    """Sharding of one leaf while it is computed with, once what FSDP_AXES divide is gathered."""
    return _sharding(_compute_axes(leaf.shape, leaf.axes, mesh), mesh)


MeshAxes = list[tuple[str, ...]]
"""For every dimension of an array the mesh axes that divide it."""


def _sharding(mesh_axes: MeshAxes, mesh: Mesh) -> NamedSharding:
    parts = [axes[0] if len(axes) == 1 else axes or None for axes in mesh_axes]
    return NamedSharding(mesh, PartitionSpec(*parts))


def _compute_axes(shape: Sequence[int], axes: Axes, mesh: Mesh) -> MeshAxes:
    """Find the mesh axes that divide an array while it is computed with: those of RULES."""
    return [
        (RULES[axis],) if axis in RULES and size % mesh.shape[RULES[axis]] == 0 else ()
        for axis, size in zip(axes, shape, strict=True)
    ]


def _storage_axes(shape: Sequence[int], axes: Axes, mesh: Mesh) -> MeshAxes:
    """Find the mesh axes that divide an array as it is held: FSDP_AXES besides, for a matrix."""
    mesh_axes = _compute_axes(shape, axes, mesh)
    for free in _free_groups(axes, mesh):
        for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            if axis not in ("layers", "vocab") and size % _size(mesh_axes[i] + free, mesh) == 0:
                mesh_axes[i] += free
                return mesh_axes
    return mesh_axes


def _free_groups(axes: Axes, mesh: Mesh) -> list[tuple[str, ...]]:
    """List the groups of FSDP_AXES for a matrix, without the axis that experts take.

    Axes that divide nothing, of size 1, are left out.
    """
    if sum(axis != "layers" for axis in axes) < 2:
        return []
    taken = RULES["experts"] if "experts" in axes else ""
    free = [name for name in AXES if name != taken and mesh.shape[name] > 1]
    groups = [tuple(axis for axis in group if axis in free) for group in FSDP_AXES]
    return [group for group in dict.fromkeys(groups) if group]


def _size(axes: Sequence[str], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def leaf_shardings(leaves: Mapping[str, Leaf], mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every leaf by path."""
    return {path: leaf_sharding(leaf, mesh) for path, leaf in leaves.items()}


def replication_report(leaves: Mapping[str, Leaf], mesh: Mesh) -> list[str]:
    """Return a line for everything that is replicated because mesh axes do not divide it."""
    lines = []
    for path, leaf in leaves.items():
        stored = _storage_axes(leaf.shape, leaf.axes, mesh)
        lines += [
            f"{path}: {axis} {size} is replicated, mesh.{RULES[axis]} {mesh.shape[RULES[axis]]} "
            "does not divide it"
            for axis, size, axes in zip(leaf.axes, leaf.shape, stored, strict=True)
            if axis in RULES and RULES[axis] not in axes
        ]
        held = {name for axes in stored for name in axes}
        wanted = next(iter(_free_groups(leaf.axes, mesh)), ())
        left = [name for name in wanted if name not in held]
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
