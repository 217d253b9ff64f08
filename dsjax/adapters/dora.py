# SPDX-License-Identifier: Apache-2.0
"""DoRA (arXiv 2402.09353): LoRA gives the direction of every row of a weight, a vector its length.

In: a linear map. Out: its adapter. With V = W + scaling * B A, and |V| the norm of each row, the
map is m / |V| * V x + b, and m is trained too. As in the paper (section 4.3) and in PEFT, no
gradient goes through |V|. It is computed from |W|, W A^T and A A^T: V itself is never made. Not
done here: LoRA's factors (`linear_lora`, `expert_lora`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.adapters.expert_lora import ExpertLora
from dsjax.adapters.linear_lora import Lora
from dsjax.models.layers import Linear
from dsjax.models.moe import ExpertLinear
from dsjax.models.ops.blocks import precision
from dsjax.models.parameters import AdapterParam, abstract, stacked_axes
from dsjax.models.slots import Dropout, LinearMap

MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name of m."""


class Dora(Lora):
    """The map with its rows at the length of m: m / |V| * (W x + scaling * B A x) + b."""

    def __init__(self, linear: Linear, path: str, ranks: list[int], *options: Any):
        """Declare LoRA's factors and the magnitudes; see `Lora`."""
        super().__init__(linear, path, ranks, *options)
        self.lora_magnitude_vector = AdapterParam(
            abstract((linear.out_features,), linear.layers),
            axes=stacked_axes(linear.axes[:1], linear.layers),
            count=sum(rank > 0 for rank in ranks) * linear.out_features,
        )

    def __call__(
        self, x: Float[Array, "*B I"], linear: LinearMap, dropout: Dropout | None
    ) -> Float[Array, "*B O"]:
        """Apply the map. What dropout leaves of x is what the change of length is applied to."""
        y, dropped = linear(x), self.dropped(x, dropout)
        rows = y if dropped is x else linear(dropped)
        if linear.bias is not None:
            rows = rows - linear.bias.astype(rows.dtype)
        scale_O = self._scale(linear.weight)
        change = (scale_O - 1) * rows + scale_O * self.update(dropped)
        return y + change.astype(y.dtype)

    def merged_weight(self, weight: Float[Array, "O I"]) -> Float[Array, "O I"]:
        """Return the weight at its new length, in float32."""
        return self._scale(weight)[:, None] * super().merged_weight(weight)

    def _scale(self, weight: jax.Array) -> Float[Array, " O"]:
        norms = row_norms(weight, *self.factors(), self.scaling[...])
        return length_ratio(self.lora_magnitude_vector[...], norms, self.scaling[...] != 0)


class ExpertDora(ExpertLora):
    """`Dora` for one linear map per expert."""

    def __init__(self, linear: ExpertLinear, ranks: list[int], *options: Any):
        """Declare LoRA's factors and the magnitudes; see `ExpertLora`."""
        super().__init__(linear, ranks, *options)
        self.lora_magnitude_vector = AdapterParam(
            abstract((linear.experts, linear.out_features), linear.layers),
            axes=("layers", "experts", linear.axes[0]),
            count=sum(rank > 0 for rank in ranks) * linear.out_features,
        )

    def __call__(
        self, x_ZI: Float[Array, "Z I"], linear: LinearMap, sizes_E: Int[Array, " E"]
    ) -> Float[Array, "Z O"]:
        """Apply each group's map."""
        scaling_E = self.scaling[...]
        norms_EO = row_norms(linear.weight, *self.factors(), scaling_E, linear.divided_by)
        adapted_E1 = (scaling_E != 0)[:, None]
        scale_EO = length_ratio(self.lora_magnitude_vector[...], norms_EO, adapted_E1)
        scale_ZO = jnp.repeat(scale_EO, sizes_E, axis=0, total_repeat_length=x_ZI.shape[0])
        return (scale_ZO * super().__call__(x_ZI, linear, sizes_E)).astype(x_ZI.dtype)


def row_norms(
    weight: Float[Array, "*E O I"],
    a: Float[Array, "*E r I"],
    b: Float[Array, "*E O r"],
    scaling: Float[Array, "*E"],
    divided_by: str | None = None,
) -> Float[Array, "*E O"]:
    """Return the norm of every row of W + scaling * B A in float32; no gradient goes through it.

    Args:
        weight: W.
        a: A.
        b: B.
        scaling: of the update.
        divided_by: the mesh axis over whose devices I is divided, inside `shard_map`.
    """
    weight, a, b = map(lax.stop_gradient, (weight, a, b))
    wide, exact = jnp.float32, precision(weight.dtype)
    narrow = a.astype(weight.dtype)
    squares = jnp.sum(jnp.square(weight.astype(wide)), axis=-1)
    low = jnp.einsum(
        "...oi,...ri->...or", weight, narrow, precision=exact, preferred_element_type=wide
    )
    gram = jnp.einsum("...ri,...si->...rs", a, a, precision=precision(a.dtype))
    if divided_by is not None:
        squares, low, gram = lax.psum((squares, low, gram), divided_by)
    b = b * scaling[..., None, None]
    both = 2 * low + jnp.einsum("...or,...rs->...os", b, gram, precision=precision(b.dtype))
    return jnp.sqrt(jnp.maximum(squares + jnp.sum(b * both, axis=-1), 0))


def lengths(weight: Float[Array, "*E O I"]) -> Float[Array, "*E O"]:
    """Return the norm of every row of W, in float32: the first m."""
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=-1))


def length_ratio(
    magnitude: Float[Array, "*E O"], norms: Float[Array, "*E O"], adapted: jax.Array
) -> Float[Array, "*E O"]:
    """Return m / |V|; 1 where there is no adapter, and for rows of zeros, which have no length."""
    usable = adapted & (norms > 0)
    return jnp.where(usable, magnitude / jnp.where(usable, norms, 1), 1)
