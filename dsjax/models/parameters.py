# SPDX-License-Identifier: Apache-2.0
"""Declarations of a model's arrays: their shapes, their logical axes, and what trains them.

In: the shape of one layer. Out: NNX variables that hold abstract arrays, stacked over layers where
a stack declares them. Not done here: values (`weights.load`), shardings (`distributed.sharding`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class AdapterParam(nnx.Variable):
    """A trainable array of an adapter. Deliberately no `nnx.Param`: a filter never takes both."""


class AdapterBuffer(nnx.Variable):
    """A constant array of an adapter (a scale per layer); never trained."""


def parameter(
    shape: tuple[int, ...], axes: tuple[str | None, ...], layers: int | None, **metadata: Any
) -> nnx.Param:
    """Declare a parameter: shape and logical axes of one layer, stacked when `layers` is given.

    Args:
        shape: of one layer.
        axes: logical axis of every dimension.
        layers: number of stacked layers, None outside a stack.
        metadata: `trains=False` for what no gradient reaches, `balances=True` for what of that the
            step may move by the experts' loads, `dtype` where only one will do, `exact=True` for a
            matrix that is computed with in float32 whatever the activations are.
    """
    return nnx.Param(abstract(shape, layers), axes=stacked_axes(axes, layers), **metadata)


def abstract(shape: tuple[int, ...], layers: int | None) -> jax.ShapeDtypeStruct:
    """Return a declaration's abstract float32 array; the partition decides how it is held."""
    return jax.ShapeDtypeStruct(shape if layers is None else (layers, *shape), jnp.float32)


def stacked_axes(axes: tuple[str | None, ...], layers: int | None) -> tuple[str | None, ...]:
    """Logical axes of a declaration, led by `layers` in a stack."""
    return axes if layers is None else ("layers", *axes)
