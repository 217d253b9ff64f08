# SPDX-License-Identifier: Apache-2.0
"""LoRA on routed experts: a pair of factors per expert, and how PEFT holds all of a layer in one.

In: an `ExpertLinear` of all experts of a stack of layers. Out: the adapter for its slot, and the
factors in PEFT's fused layout. On disk every expert has its own weights
(`mlp.experts.17.gate_proj`); transformers 5 holds a layer's experts as two parameters
(`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`), and PEFT adapts those. Not done here: which
experts are adapted (`lora`), reading and writing files.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.adapters import lora_start
from dsjax.models.moe import ExpertLinear
from dsjax.models.ops.grouped_matmul import grouped_matmul
from dsjax.models.parameters import AdapterBuffer, AdapterParam, abstract

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""What transformers 5 calls a layer's experts: two parameters of the module `experts`."""

_ROUTED = re.compile(r"(.*\.experts)\.\d+\.(gate|up|down)_proj")


class ExpertLora(nnx.Module):
    """The updates of one linear map per expert: y + scaling_e * B_e A_e x.

    A device may hold a part of the experts and of their width. Then what it adds is a part of a
    sum over the devices that divide the width where A is cut by its inputs, as y is.
    """

    def __init__(
        self,
        linear: ExpertLinear,
        ranks: list[int],
        scalings: list[float],
        start: bool | str = True,
    ):
        """Declare the factors for all experts of all layers.

        Args:
            linear: the map whose slot this goes into.
            ranks: rank per expert, layer by layer; 0 for an expert without an adapter.
            scalings: factor of the update, in the same order.
            start: `init_lora_weights`.
        """
        rank, experts, layers = max(ranks), linear.experts, linear.layers
        out_axis, in_axis = linear.axes
        self.ranks, self.start = tuple(ranks), start
        self.lora_A = AdapterParam(
            abstract((experts, rank, linear.in_features), layers),
            axes=("layers", "experts", None, in_axis),
            count=sum(ranks) * linear.in_features,
        )
        self.lora_B = AdapterParam(
            abstract((experts, linear.out_features, rank), layers),
            axes=("layers", "experts", out_axis, None),
            count=sum(ranks) * linear.out_features,
        )
        self.scaling = AdapterBuffer(
            abstract((experts,), layers), axes=("layers", "experts"), values=tuple(scalings)
        )
        self.initial_lora_A, self.initial_lora_B = lora_start.declared(self)

    def __call__(
        self,
        x_ZI: Float[Array, "Z I"],
        linear: Callable[[jax.Array], jax.Array],
        sizes_E: Int[Array, " E"],
    ) -> Float[Array, "Z O"]:
        """Add each group's update, in x's dtype; see `Lora`."""
        a_ErI, b_EOr = self.factors()
        low_Zr = grouped_matmul(x_ZI, a_ErI, sizes_E)
        scaling_Z = jnp.repeat(self.scaling[...], sizes_E, total_repeat_length=x_ZI.shape[0])
        low_Zr = (low_Zr * scaling_Z[:, None]).astype(x_ZI.dtype)
        return linear(x_ZI) + grouped_matmul(low_Zr, b_EOr, sizes_E)

    def factors(self) -> tuple[Float[Array, "E r I"], Float[Array, "E O r"]]:
        """Return A and B; see `Lora.factors`."""
        return lora_start.since_start(self)


def is_routed(module: str) -> bool:
    """Whether a module, by its name on disk, is one of a layer's routed experts."""
    return _ROUTED.fullmatch(module) is not None


def parameter_of(module: str) -> tuple[str, int]:
    """Name transformers 5's parameter that holds a module's weight, and how many share its rank.

    A layer's experts' gates and ups are one parameter: a LoRA of rank 2r for it is r for each.
    """
    found = _ROUTED.fullmatch(module)
    if found is None:
        return f"{module}.weight", 1
    return (f"{found[1]}.{DOWN}", 1) if found[2] == "down" else (f"{found[1]}.{GATE_UP}", 2)


def fuse(
    a_ErI: Float[np.ndarray, "E r I"], b_EOr: Float[np.ndarray, "E O r"]
) -> tuple[Float[np.ndarray, "Er I"], Float[np.ndarray, "O rE"]]:
    """Bring a layer's factors into PEFT's order: A by expert then rank, B by rank then expert."""
    return a_ErI.reshape(-1, a_ErI.shape[-1]), b_EOr.transpose(1, 2, 0).reshape(b_EOr.shape[1], -1)


def split(
    a: Float[np.ndarray, "Er I"], b: Float[np.ndarray, "O rE"], experts: int
) -> tuple[Float[np.ndarray, "E r I"], Float[np.ndarray, "E O r"]]:
    """Undo `fuse`."""
    b_EOr = b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)
    return a.reshape(experts, -1, a.shape[-1]), b_EOr


def stack_gate_up(
    gate: tuple[np.ndarray, np.ndarray], up: tuple[np.ndarray, np.ndarray]
) -> tuple[Float[np.ndarray, "E R I"], Float[np.ndarray, "E P R"]]:
    """Join the factors of gate and up to those of both at once: A stacked, B a block for each."""
    (a_gate_ErI, b_gate_EOr), (a_up_ErI, b_up_EOr) = gate, up
    experts, out, rank = b_gate_EOr.shape
    b_EPR = np.zeros((experts, 2 * out, 2 * rank), b_gate_EOr.dtype)
    b_EPR[:, :out, :rank], b_EPR[:, out:, rank:] = b_gate_EOr, b_up_EOr
    return np.concatenate([a_gate_ErI, a_up_ErI], axis=1), b_EPR


def split_gate_up(
    a_ERI: Float[np.ndarray, "E R I"], b_EPR: Float[np.ndarray, "E P R"]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
    """Undo `stack_gate_up`; None where gate and up share a part of their ranks."""
    out, rank = b_EPR.shape[1] // 2, b_EPR.shape[2] // 2
    if b_EPR[:, :out, rank:].any() or b_EPR[:, out:, :rank].any():
        return None
    gate = a_ERI[:, :rank], b_EPR[:, :out, :rank]
    return gate, (a_ERI[:, rank:], b_EPR[:, out:, rank:])
