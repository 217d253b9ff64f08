# SPDX-License-Identifier: Apache-2.0
"""LoRA's update of one linear map, for all layers of a stack.

In: a linear map. Out: the adapter for its slot. Where layers differ in rank, or have no adapter,
the missing rows are zeros, which stay zeros: each factor's gradient is a product with the other.
Not done here: routed experts (`expert_lora`), which maps have one (`lora`).
"""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.adapters import lora_start
from dsjax.models.layers import Linear, product
from dsjax.models.parameters import AdapterBuffer, AdapterParam, abstract, stacked_axes
from dsjax.models.slots import Dropout


class Lora(nnx.Module):
    """The update of one linear map: y + scaling * B A dropout(x)."""

    def __init__(
        self,
        linear: Linear,
        path: str,
        ranks: list[int],
        scalings: list[float],
        p: float = 0.0,
        start: bool | str = True,
    ):
        """Declare the factors for all layers of a stack (one outside a stack).

        Args:
            linear: the map whose slot this goes into.
            path: its path; makes its dropout differ from every other's.
            ranks: rank per layer, 0 for a layer without an adapter.
            scalings: factor of the update per layer.
            p: probability that dropout zeroes an input.
            start: `init_lora_weights`.
        """
        rank, layers = max(ranks), linear.layers
        out_axis, in_axis = linear.axes
        self.dropout, self.seed = p, zlib.crc32(path.encode())
        self.ranks, self.start = tuple(ranks), start
        self.lora_A = AdapterParam(
            abstract((rank, linear.in_features), layers),
            axes=stacked_axes((None, in_axis), layers),
            count=sum(ranks) * linear.in_features,
        )
        self.lora_B = AdapterParam(
            abstract((linear.out_features, rank), layers),
            axes=stacked_axes((out_axis, None), layers),
            count=sum(ranks) * linear.out_features,
        )
        self.scaling = AdapterBuffer(
            abstract((), layers), axes=stacked_axes((), layers), values=tuple(scalings)
        )
        self.initial_lora_A, self.initial_lora_B = lora_start.declared(self)

    def __call__(
        self,
        x: Float[Array, "*B I"],
        linear: Callable[[jax.Array], jax.Array],
        dropout: Dropout | None,
    ) -> Float[Array, "*B O"]:
        """Add the update, in x's dtype: no array of y's size is made in a wider one.

        The scaling goes with the narrow product, whose numbers are the fewest, so that the wide one
        is a plain addend of y, which GPU libraries add where they write the product.
        """
        return linear(x) + self.update(self.dropped(x, dropout))

    def dropped(self, x: Float[Array, "*B I"], dropout: Dropout | None) -> Float[Array, "*B I"]:
        """Return what dropout leaves of x; x itself where there is none."""
        if not self.dropout or dropout is None:
            return x
        keep = dropout.fold_in(self.seed).keep(1 - self.dropout, x.shape[-1])
        return jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)

    def update(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Return scaling * B A x."""
        a_rI, b_Or = self.factors()
        low = (product(x, a_rI) * self.scaling[...]).astype(x.dtype)
        return product(low, b_Or)

    def factors(self) -> tuple[Float[Array, "r I"], Float[Array, "O r"]]:
        """Return A and B; of twice the rank, where the change since the start is what counts."""
        return lora_start.since_start(self)

    def merged_weight(self, weight: Float[Array, "O I"]) -> Float[Array, "O I"]:
        """Return the weight with the update, in float32."""
        exact = jax.lax.Precision.HIGHEST
        a_rI, b_Or = self.factors()
        return weight + jnp.einsum("or,ri->oi", b_Or, a_rI, precision=exact) * self.scaling[...]
