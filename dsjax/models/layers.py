# SPDX-License-Identifier: Apache-2.0
"""The layers every family is made of: linear maps with a slot for an adapter, embedding, RMSNorm.

In: activations in the compute dtype. Out: the same. Weights keep Hugging Face's names and its
layout (`weight` is [out, in]) so that a checkpoint's tensors are these arrays; a layer that is one
of a stack holds all layers as [L, ...]. Modules are abstract (`jax.ShapeDtypeStruct` leaves): they
declare shape, dtype and logical axes, and are filled elsewhere. Not done here: loading, sharding.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.models.ops.blocks import precision
from dsjax.models.parameters import parameter
from dsjax.models.slots import Dropout, LinearSlot
from dsjax.models.storage import DENSE, Decode, decoded_weight, stored_arrays


def product(x: Float[Array, "*B I"], weight: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    """Multiply x W^T in x's dtype. The gradient of a wider W is summed and given in W's own dtype.

    So it is in float32 that devices, chunks and microbatches add their parts of it.

    Args:
        x: rows.
        weight: W, of x's dtype or a wider one.
    """
    return (_product if weight.dtype == x.dtype else _wide_product)(x, weight)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), precision=precision(x.dtype))


@jax.custom_vjp
def _wide_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _product(x, weight)


def _wide_product_forward(x: jax.Array, weight: jax.Array):
    return _product(x, weight), (x, weight)


def _wide_product_backward(residuals: tuple[jax.Array, ...], y: jax.Array):
    x, weight = residuals
    _, pull = jax.vjp(lambda x: _product(x, weight), x)
    rows = tuple(range(x.ndim - 1))
    d_weight = lax.dot_general(y, x, ((rows, rows), ((), ())), preferred_element_type=weight.dtype)
    return *pull(y), d_weight


_wide_product.defvjp(_wide_product_forward, _wide_product_backward)


def stored_product(
    decode: Decode, x: Float[Array, "*B I"], stored: Mapping[str, Array]
) -> Float[Array, "*B O"]:
    """Multiply x W^T by a matrix that does not train and is held in another storage than `dense`.

    It is decoded again for the gradient of x. Kept instead, the matrices of all layers would be
    there at once.

    Args:
        decode: `Storage.decode`.
        x: rows.
        stored: the arrays that hold W.
    """
    return _stored_product(decode, x, stored)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stored_product(decode: Decode, x: jax.Array, stored: Mapping[str, jax.Array]) -> jax.Array:
    return _product(x, decode(stored, x.dtype))


def _stored_product_forward(decode: Decode, x: jax.Array, stored: Mapping[str, jax.Array]):
    return _stored_product(decode, x, stored), stored


def _stored_product_backward(decode: Decode, stored: Mapping[str, jax.Array], y: jax.Array):
    weight = decode(stored, y.dtype).astype(y.dtype)
    return jnp.einsum("...o,oi->...i", y, weight, precision=precision(y.dtype)), None


_stored_product.defvjp(_stored_product_forward, _stored_product_backward)


def spread(x: Float[Array, "*S"], shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Broadcast, then cast: in the other order the gradient would be summed in `dtype`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.broadcast_to(x.astype(wide), shape).astype(dtype)


class BaseMap(NamedTuple):
    """What a slot is handed of the map that it is in (`LinearMap`).

    Attributes:
        linear: the map.
        base: computes it without what is in the slot.
        dtype: of the activations.
        bias: its bias.
        divided_by: mesh axis over whose devices its inputs are divided.
    """

    linear: Any
    base: Callable[[jax.Array], jax.Array]
    dtype: jnp.dtype
    bias: jax.Array | None = None
    divided_by: str | None = None

    @property
    def weight(self) -> jax.Array:
        """The kernel; decoded here, where it is asked for."""
        return decoded_weight(self.linear, self.dtype)

    def __call__(self, x: jax.Array, /) -> jax.Array:
        """Apply the map to x."""
        return self.base(x)


class Linear(nnx.Module):
    """y = x W^T + b, as the adapter in the slot changes it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool = False,
        layers: int | None = None,
        **metadata: Any,
    ):
        """Declare the weights.

        Args:
            in_features: size of the last axis of x.
            out_features: size of the last axis of y.
            axes: logical axes of the weight's (out, in).
            bias: whether there is a bias.
            layers: number of stacked layers, None outside a stack.
            metadata: see `parameter`.
        """
        self.in_features, self.out_features, self.layers = in_features, out_features, layers
        self.axes, self.trains = axes, metadata.get("trains", True)
        self.storage, self.stored_as = DENSE, ("",)
        self.weight = parameter((out_features, in_features), axes, layers, **metadata)
        self.bias = parameter((out_features,), axes[:1], layers, **metadata) if bias else None
        self.adapter: LinearSlot | None = nnx.data(None)

    def __call__(
        self, x: Float[Array, "*B I"], dropout: Dropout | None = None
    ) -> Float[Array, "*B O"]:
        """Map the last axis; weights are used in x's dtype."""
        if self.adapter is None:
            return self.base(x)
        bias = None if self.bias is None else self.bias[...]
        return self.adapter(x, BaseMap(self, self.base, x.dtype, bias), dropout)

    def base(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Apply the map without what is in the slot."""
        if self.storage is DENSE:
            y = product(x, self.weight[...])
        else:
            y = stored_product(self.storage.decode, x, stored_arrays(self))
        return y if self.bias is None else y + spread(self.bias[...], y.shape, y.dtype)

    def merged_weight(self, dtype: jnp.dtype) -> Float[Array, "O I"]:
        """Return the weight that does alone what map and adapter do together, but for the bias."""
        weight = decoded_weight(self, dtype)
        if self.adapter is not None:
            weight = self.adapter.merged_weight(weight.astype(jnp.float32))
        return weight.astype(dtype)


class MLP(nnx.Module):
    """SiLU-gated feed-forward."""

    def __init__(self, narrow: int, wide: int, *, bias: bool = False, layers: int | None = None):
        self.gate_proj = Linear(narrow, wide, ("mlp", "embed"), bias=bias, layers=layers)
        self.up_proj = Linear(narrow, wide, ("mlp", "embed"), bias=bias, layers=layers)
        self.down_proj = Linear(wide, narrow, ("embed", "mlp"), bias=bias, layers=layers)

    def __call__(
        self, x_BTD: Float[Array, "*B D"], dropout: Dropout | None = None
    ) -> Float[Array, "*B D"]:
        """Widen, gate, narrow."""
        gated_BTF = gated(self.gate_proj(x_BTD, dropout), self.up_proj(x_BTD, dropout))
        return self.down_proj(gated_BTF, dropout)


@jax.custom_vjp
def gated(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """SiLU of one, times the other. Only both are kept for the gradients, which are float32."""
    return jax.nn.silu(gate) * up


def _gated_forward(gate: jax.Array, up: jax.Array):
    return gated(gate, up), (gate, up)


def _gated_backward(residuals: tuple[jax.Array, jax.Array], y: jax.Array):
    gate, up, wide = (x.astype(jnp.float32) for x in (*residuals, y))
    share = jax.nn.sigmoid(gate)
    d_gate = wide * up * share * (1 + gate * (1 - share))
    return d_gate.astype(y.dtype), (wide * gate * share).astype(y.dtype)


gated.defvjp(_gated_forward, _gated_backward)


class Embedding(nnx.Module):
    """Token embedding, which serves as the output head too where a checkpoint ties them."""

    def __init__(self, vocab_size: int, hidden_size: int):
        self.weight = parameter((vocab_size, hidden_size), ("vocab", "embed"), None)

    def __call__(self, input_ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Look the tokens up, in the compute dtype."""
        return _rows_of(self.weight[...], input_ids, dtype)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Score every token of the vocabulary against x (tied output head)."""
        return product(x, self.weight[...])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows_of(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table, which are cast; their gradients are added up in the table's own dtype."""
    return table.astype(dtype)[ids]


def _rows_of_forward(table: jax.Array, ids: jax.Array, dtype: jnp.dtype):
    return _rows_of(table, ids, dtype), (ids, table)


def _rows_of_backward(dtype: jnp.dtype, residuals: tuple[jax.Array, ...], rows: jax.Array):
    ids, table = residuals
    return jnp.zeros_like(table).at[ids].add(rows.astype(table.dtype)), None


_rows_of.defvjp(_rows_of_forward, _rows_of_backward)


class LayerNorm(nnx.Module):
    """Mean and variance norm over the last axis, with a bias."""

    def __init__(self, size: int, eps: float, layers: int | None = None, **metadata: Any):
        self.eps = eps
        self.weight = parameter((size,), (None,), layers, **metadata)
        self.bias = parameter((size,), (None,), layers, **metadata)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise and scale in float32, cast back."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(variance + self.eps)
        return (normed * self.weight[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, size: int, eps: float, layers: int | None = None):
        self.eps = eps
        self.weight = parameter((size,), (None,), layers)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise in float32, cast back, then scale in x's dtype: the reference's order."""
        return _rms_norm(x, self.weight[...], self.eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Scaled rows. Only x is kept for the gradients, which are computed in float32."""
    normed = (x.astype(jnp.float32) * _inverse_rms(x, eps)).astype(x.dtype)
    return spread(weight, x.shape, x.dtype) * normed


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    return lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


def _rms_norm_forward(x: jax.Array, weight: jax.Array, eps: float):
    return _rms_norm(x, weight, eps), (x, weight)


def _rms_norm_backward(eps: float, residuals: tuple[jax.Array, jax.Array], y: jax.Array):
    x, weight = residuals
    inverse, wide = _inverse_rms(x, eps), y.astype(jnp.float32)
    normed = x.astype(jnp.float32) * inverse
    d_weight = jnp.sum(wide * normed, axis=tuple(range(x.ndim - 1)))
    scaled = wide * weight.astype(x.dtype).astype(jnp.float32)
    d_x = inverse * (scaled - normed * jnp.mean(scaled * normed, axis=-1, keepdims=True))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
