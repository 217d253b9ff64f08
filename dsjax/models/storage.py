# SPDX-License-Identifier: Apache-2.0
"""How a frozen matrix is held: as which arrays, made from the file's tensor, and read by a layer.

In: a linear map of a stack. Out: in place of its `weight` the arrays of a kind of storage. They lie
beside one another (`weight`, `weight_absmax`), each with its shape, dtype and logical axes, so that
they are loaded, sharded, gathered and counted as any array is; a layer's matrix is decoded inside
the scanned body, after the gather. Not done here: the registry of kinds (`models.STORAGE`), which
of them a run asks for, reading files.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Index = tuple[slice, ...]
Decode = Callable[[Mapping[str, jax.Array], jnp.dtype], jax.Array]
Encode = Callable[[str, str, Index], np.ndarray]
"""(tensor, array, index into that array) -> that part of it. It reads no more than the part needs,
in pieces where that is much (`arrays.row_pieces`)."""


class StoredParam(nnx.Variable):
    """One of the arrays that hold a frozen matrix. No `nnx.Param`: nothing trains or casts it."""


@runtime_checkable
class TensorReader(Protocol):
    """An opened checkpoint, as far as an encoder needs it (`weights.source.Source`)."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Every tensor by name; each has a `shape`."""
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Read the tensor's numbers, or a part of them."""
        ...


class StoredArray(NamedTuple):
    """One array of a stored matrix [O, I].

    Attributes:
        shape: for one matrix.
        dtype: name of the dtype, whatever the model's is.
        axes: logical axes.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]


def _holds_all(shape: tuple[int, int]) -> str:
    return ""


@dataclass(frozen=True)
class Storage:
    """A kind of storage.

    Attributes:
        arrays: (shape, axes) of a matrix -> its arrays by what their names have after `weight`;
            that of "" keeps the matrix's rows as its first axis.
        encoder: checkpoint -> what makes the arrays of its tensors, called from several threads.
        decode: (arrays of a layer, or of a whole stack, and the dtype of the activations) -> its
            matrix [..., O, I], which the layer casts to that dtype if it is another.
    """

    arrays: Callable[[tuple[int, int], tuple[str | None, ...]], Mapping[str, StoredArray]]
    encoder: Callable[[TensorReader], Encode]
    decode: Decode
    problem: Callable[[tuple[int, int]], str] = _holds_all


def _reader(source: TensorReader) -> Encode:
    return lambda name, array, index: source.read(name, index)


DENSE = Storage(
    arrays=lambda shape, axes: {"": StoredArray(shape, "float32", axes)},
    encoder=_reader,
    decode=lambda arrays, dtype: arrays[""],
)
"""The parameter itself, in the dtype that the partition gives it; it may train."""


def store(linear: Any, storage: Storage) -> None:
    """Declare the arrays of a kind of storage in place of the weight of a linear map in a stack.

    Args:
        linear: a `Linear` or an `ExpertLinear`, abstract.
        storage: the kind.
    """
    shape, axes = tuple(linear.weight.shape), linear.weight.get_metadata()["axes"]
    lead, matrix = len(shape) - 2, (shape[-2], shape[-1])
    arrays = storage.arrays(matrix, axes[lead:])
    for name, array in arrays.items():
        declared = StoredParam(
            jax.ShapeDtypeStruct((*shape[:lead], *array.shape), jnp.dtype(array.dtype)),
            axes=(*axes[:lead], *array.axes),
            dtype=array.dtype,
            trains=False,
            count=0 if name else math.prod(shape),
            holds=None if name else shape,
        )
        setattr(linear, f"weight{name}", declared)
    linear.storage, linear.stored_as = storage, tuple(arrays)


def storage_of(linear: Any | None) -> tuple[Storage, tuple[str, ...]]:
    """How a parameter is held, and as which arrays: its path followed by each of these names.

    Args:
        linear: the linear map whose weight is stored (`models.stored_linears`), None of all others.
    """
    return (DENSE, ("",)) if linear is None else (linear.storage, linear.stored_as)


def stored_arrays(linear: Any) -> dict[str, jax.Array]:
    """Return what holds the matrix of a linear map in a layer, by the names after `weight`."""
    return {name: getattr(linear, f"weight{name}")[...] for name in linear.stored_as}


def decoded_weight(linear: Any, dtype: jnp.dtype) -> jax.Array:
    """Decode the matrix of a linear map in a layer, for activations of this dtype."""
    return linear.storage.decode(stored_arrays(linear), dtype)


def base_shape(variable: nnx.Variable) -> tuple[int, ...] | None:
    """Return the shape of the base parameter that a variable is or holds; None of a mere helper."""
    if isinstance(variable, nnx.Param):
        return tuple(variable.shape)
    return variable.get_metadata().get("holds") if isinstance(variable, StoredParam) else None
