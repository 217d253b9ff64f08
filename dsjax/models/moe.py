# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: who goes where, and the experts' feed-forwards.

In: activations [B, T, D]. Out: the same, and how many tokens each expert took. No token is ever
dropped: every device has room for all tokens of its expert group. Over devices that divide the
experts the tokens are gathered, each device computes its own experts for all of them, and the sums
are scattered back; the result equals one device's for any routing. Not done here: adding the
balance losses to a loss (`step`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsjax.distributed.sharding import Layout
from dsjax.models.layers import MLP, BaseMap, gated
from dsjax.models.ops.blocks import in_blocks, out_of_blocks, precision
from dsjax.models.ops.grouped_matmul import grouped_matmul, stored_grouped_matmul
from dsjax.models.parameters import parameter
from dsjax.models.slots import Dropout, ExpertSlot
from dsjax.models.storage import DENSE, stored_arrays

ROUTING = "routing"
"""What a remat policy calls the choice of experts."""

CHUNK_BYTES = 2**29
"""Most bytes on a device of the rows that are sorted by expert, one for each expert of a token."""


CHUNK_MULTIPLE = 128
"""Chunks of tokens are multiples of this: XLA for TPU compiles odd sizes ten times as slowly."""


class RouterConfig(NamedTuple):
    """How a family chooses experts; Hugging Face's names.

    Attributes:
        n_routed_experts: E.
        num_experts_per_tok: A.
        scoring_func: `softmax` or `sigmoid`.
        topk_method: `greedy`, `group_limited_greedy` (V2), `noaux_tc` (V3).
        n_group: groups that the experts are divided into.
        topk_group: groups that a token may choose from.
        norm_topk_prob: whether the chosen weights are made to sum to 1.
        routed_scaling_factor: what they are multiplied by.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    scoring_func: str
    topk_method: str
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


class Routing(NamedTuple):
    """Who goes where: for each token its experts and their weights."""

    experts: Int[Array, "B T A"]
    weights: Float[Array, "B T A"]


class RouterStats(NamedTuple):
    """How the experts of a layer shared the work.

    Attributes:
        tokens_per_expert: tokens that each took.
        balance: for each row the balance loss, 1 where all experts work alike.
    """

    tokens_per_expert: Int[Array, "*L E"]
    balance: Float[Array, "*L B"]


class Router(nnx.Module):
    """Scores every expert for every token, in float32, and picks the best."""

    def __init__(self, config: RouterConfig, hidden_size: int, layers: int):
        self.config = config
        experts = config.n_routed_experts
        self.weight = parameter((experts, hidden_size), (None, "embed"), layers, exact=True)
        self.e_score_correction_bias = (
            parameter((experts,), (None,), layers, trains=False, balances=True, dtype="float32")
            if config.topk_method == "noaux_tc"
            else None
        )

    def __call__(
        self, x_BTD: Float[Array, "B T D"], real_BT: Bool[Array, "B T"]
    ) -> tuple[Routing, RouterStats]:
        """Choose; DeepSeek-V2 (arXiv 2405.04434, 2.1.2) and V3 (arXiv 2412.19437, 2.1.2)."""
        c, wide = self.config, jnp.float32
        weight_ED = self.weight[...].astype(wide)
        logits_BTE = jnp.einsum(
            "btd,ed->bte", x_BTD.astype(wide), weight_ED, precision=precision(jnp.dtype(wide))
        )
        if c.scoring_func == "softmax":
            scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        else:
            scores_BTE = jax.nn.sigmoid(logits_BTE)
        _, experts_BTA = lax.top_k(
            lax.stop_gradient(self.selection_scores(scores_BTE)), c.num_experts_per_tok
        )
        experts_BTA = checkpoint_name(experts_BTA, ROUTING)
        weights_BTA = jnp.take_along_axis(scores_BTE, experts_BTA, axis=-1)
        if c.norm_topk_prob:
            weights_BTA = _sum_to_one(weights_BTA)
        work = RouterStats(
            jnp.sum(_counts(experts_BTA, real_BT, c.n_routed_experts), axis=0),
            self._balance(scores_BTE, experts_BTA, real_BT),
        )
        return Routing(experts_BTA, weights_BTA * c.routed_scaling_factor), work

    def _balance(
        self, scores_BTE: jax.Array, experts_BTA: jax.Array, real_BT: jax.Array
    ) -> Float[Array, " B"]:
        """Sum over experts of (share of the choices x mean score), for each row.

        V2's expert-level loss (arXiv 2405.04434, eq. 23-25) counts the choices; V3's complementary
        sequence-wise loss (arXiv 2412.19437, eq. 17-20) those that scores without bias and groups
        would make, and takes scores that sum to 1. Gradients go through the scores alone.
        """
        experts, chosen = self.config.n_routed_experts, self.config.num_experts_per_tok
        if self.config.topk_method == "noaux_tc":
            _, experts_BTA = lax.top_k(lax.stop_gradient(scores_BTE), chosen)
            scores_BTE = _sum_to_one(scores_BTE)
        tokens_B1 = jnp.maximum(real_BT.sum(-1, keepdims=True), 1)
        share_BE = _counts(experts_BTA, real_BT, experts) * experts / (chosen * tokens_B1)
        mean_BE = jnp.sum(scores_BTE * real_BT[..., None], axis=1) / tokens_B1
        return jnp.sum(share_BE * mean_BE, axis=-1)

    def selection_scores(self, scores_BTE: jax.Array) -> jax.Array:
        """Return what the choice goes by: biased scores, outside the chosen groups pushed down."""
        c = self.config
        if self.e_score_correction_bias is not None:
            scores_BTE = scores_BTE + self.e_score_correction_bias[...]
        if c.topk_method == "greedy":
            return scores_BTE
        grouped = scores_BTE.reshape(*scores_BTE.shape[:-1], c.n_group, -1)
        if c.topk_method == "noaux_tc":
            group_scores = lax.top_k(grouped, 2)[0].sum(-1)
        else:
            group_scores = grouped.max(-1)
        _, kept = lax.top_k(group_scores, c.topk_group)
        allowed = jax.nn.one_hot(kept, c.n_group, dtype=jnp.bool_).any(-2)
        # Not 0, which is as good as the score of an expert of a chosen group that underflowed.
        return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(scores_BTE.shape)


def _sum_to_one(scores: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Divide by the sum, + 1e-20 as Hugging Face does, with a gradient however small the sum is.

    That of a quotient squares the divisor, which underflows. So both sides are multiplied by a
    power of two first, which rounds nothing and brings the divisor to 1 or more.
    """
    largest = lax.stop_gradient(scores.max(-1, keepdims=True))
    _, exponent = jnp.frexp(jnp.maximum(largest, 1e-20))
    scale = jnp.ldexp(jnp.ones_like(largest), 1 - exponent)
    return scores * scale / (scores.sum(-1, keepdims=True) * scale + 1e-20 * scale)


def _counts(experts_BTA: jax.Array, real_BT: jax.Array, experts: int) -> Int[Array, "B E"]:
    """How many real tokens of each row chose each expert."""
    took = jax.nn.one_hot(experts_BTA, experts, dtype=jnp.int32)
    return jnp.sum(took * real_BT[..., None, None], axis=(1, 2))


class ExpertLinear(nnx.Module):
    """One linear map per expert, for rows that are sorted by expert."""

    def __init__(
        self, in_features: int, out_features: int, axes: tuple[str, str], experts: int, layers: int
    ):
        self.in_features, self.out_features, self.layers = in_features, out_features, layers
        self.experts, self.axes, self.trains = experts, axes, True
        self.storage, self.stored_as = DENSE, ("",)
        self.weight = parameter((experts, out_features, in_features), ("experts", *axes), layers)
        self.adapter: ExpertSlot | None = nnx.data(None)

    def __call__(
        self, x_ZI: jax.Array, sizes_E: jax.Array, by_width: str | None = None
    ) -> jax.Array:
        """Map each group of rows by its expert, as the adapter in the slot changes it.

        Args:
            x_ZI: the rows.
            sizes_E: rows of each expert.
            by_width: the mesh axis that divides the experts' width, inside `shard_map`.
        """

        def base(x_ZI: jax.Array) -> jax.Array:
            if self.storage is DENSE:
                return grouped_matmul(x_ZI, self.weight[...], sizes_E)
            return stored_grouped_matmul(self.storage.decode, x_ZI, stored_arrays(self), sizes_E)

        if self.adapter is None:
            return base(x_ZI)
        divided_by = by_width if self.axes[1] == "mlp" else None
        return self.adapter(x_ZI, BaseMap(self, base, x_ZI.dtype, divided_by=divided_by), sizes_E)


class Experts(nnx.Module):
    """The routed experts' feed-forwards."""

    def __init__(self, hidden_size: int, wide: int, experts: int, layers: int):
        out_in = ("mlp", "embed")
        self.gate_proj = ExpertLinear(hidden_size, wide, out_in, experts, layers)
        self.up_proj = ExpertLinear(hidden_size, wide, out_in, experts, layers)
        self.down_proj = ExpertLinear(wide, hidden_size, ("embed", "mlp"), experts, layers)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        routing: Routing,
        layout: Layout | None,
    ) -> Float[Array, "B T D"]:
        """Sum the chosen experts' outputs by weight, in float32, cast once."""
        if layout is None:

            def whole(x_BTD, routing):
                return _local_experts(self, x_BTD, routing, 0).astype(x_BTD.dtype)

            return _by_chunks(whole, x_BTD, routing, 1)
        graphdef, state = nnx.split(self)
        rows, by_expert, by_width = layout.rows.spec, layout.axis("experts"), layout.axis("mlp")

        def spec(variable: nnx.Variable) -> Any:
            axes = variable.get_metadata()["axes"][1:]  # inside a scan the layers' axis is gone
            return layout.spec(*axes)

        specs = jax.tree.map(spec, state, is_leaf=lambda x: isinstance(x, nnx.Variable))

        def shard(state, x_BTD, routing):
            experts = nnx.merge(graphdef, state)
            first = lax.axis_index(by_expert) * experts.gate_proj.weight.shape[0]

            def part(x_BTD, routing):
                x_BTD, routing = jax.tree.map(
                    lambda x: lax.all_gather(x, by_expert, axis=0, tiled=True), (x_BTD, routing)
                )
                out_BTD = _local_experts(experts, x_BTD, routing, first, by_width)
                out_BTD = lax.psum(out_BTD, by_width)
                out_BTD = lax.psum_scatter(out_BTD, by_expert, scatter_dimension=0, tiled=True)
                return out_BTD.astype(x_BTD.dtype)

            return _by_chunks(part, x_BTD, routing, layout.shards("experts"))

        return jax.shard_map(
            shard,
            mesh=layout.rows.mesh,
            in_specs=(specs, rows, rows),
            out_specs=rows,
            check_vma=False,
        )(state, x_BTD, routing)


def _by_chunks(
    part: Callable[[jax.Array, Routing], jax.Array],
    x_BTD: jax.Array,
    routing: Routing,
    gathered: int,
) -> jax.Array:
    """Run `part` on a few tokens of every row at a time, so that its buffers stay bounded.

    Args:
        part: (tokens, routing) -> their outputs.
        x_BTD: this device's tokens.
        routing: where they go.
        gathered: devices whose tokens `part` brings together.
    """
    batch, length, width = x_BTD.shape
    chosen = routing.experts.shape[-1]
    size = tokens_at_once(batch * gathered, chosen, width, x_BTD.dtype.itemsize)
    if size >= length:
        return part(x_BTD, routing)
    if size > CHUNK_MULTIPLE:
        size -= size % CHUNK_MULTIPLE
    pieces = jax.tree.map(lambda x: in_blocks(x, size), (x_BTD, routing))
    out = lax.map(jax.checkpoint(lambda piece: part(*piece)), pieces)
    return out_of_blocks(out)[:, :length]


def tokens_at_once(rows: int, chosen: int, width: int, itemsize: int) -> int:
    """Tokens of every row that the experts take at a time; longer rows are taken in chunks.

    Args:
        rows: whose tokens a device has together, those of the other devices of its experts' group
            included.
        chosen: experts of a token.
        width: D.
        itemsize: bytes of an activation.
    """
    return max(CHUNK_BYTES // (rows * chosen * width * itemsize), 1)


def _local_experts(
    experts: Experts, x_BTD: jax.Array, routing: Routing, first: Any, by_width: str | None = None
) -> Float[Array, "B T D"]:
    """Sum, weighted and in float32, over those of each token's experts that these arrays hold.

    Args:
        experts: holds the experts from number `first` on.
        x_BTD: tokens.
        routing: where they go.
        first: number of the first expert that is held.
        by_width: the mesh axis that divides the experts' width.
    """
    count = experts.gate_proj.weight.shape[0]
    shape, chosen = x_BTD.shape, routing.experts.shape[-1]
    index = routing.experts.reshape(-1) - first
    mine = (index >= 0) & (index < count)
    group = jnp.where(mine, index, count)  # the others come after all groups
    order = _sorted_by(group, count + 1)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    sizes_E = jnp.bincount(group, length=count + 1)[:count].astype(jnp.int32)
    x_ZD = _rows_in_order(x_BTD.reshape(-1, shape[-1]), order, back)
    gated_ZF = gated(experts.gate_proj(x_ZD, sizes_E), experts.up_proj(x_ZD, sizes_E))
    y_ZD = experts.down_proj(gated_ZF, sizes_E, by_width)
    y_ZD = _rows_in_order(y_ZD, back, order)
    y_ZD = jnp.where(mine[:, None], y_ZD, 0).astype(jnp.float32)
    weights_Z1 = routing.weights.reshape(-1, 1)
    return (y_ZD * weights_Z1).reshape(-1, chosen, shape[-1]).sum(1).reshape(shape)


def _sorted_by(group: Int[Array, " Z"], groups: int) -> Int[Array, " Z"]:
    """Return the order that sorts rows by group and keeps each group's own order.

    One array of distinct numbers is sorted, which XLA compiles three times as fast as `argsort`.
    """
    rows = group.size
    assert groups * rows < 2**31, (groups, rows)
    return jax.lax.sort(group * rows + jnp.arange(rows), is_stable=False) % rows


@jax.custom_vjp
def _rows_in_order(
    x_TD: Float[Array, "T D"], order: Int[Array, " Z"], back: Int[Array, " Z"]
) -> Float[Array, "Z D"]:
    """Each row of x as often as Z / T says, in this order. Its gradient is a gather as well.

    Args:
        x_TD: the rows.
        order: which of the repeated rows comes where.
        back: the inverse of `order`.
    """
    return x_TD[order // (order.size // x_TD.shape[0])]


def _rows_in_order_forward(x_TD: jax.Array, order: jax.Array, back: jax.Array):
    return _rows_in_order(x_TD, order, back), (back, x_TD.shape[0])


def _rows_in_order_backward(residuals: tuple[jax.Array, int], y_ZD: jax.Array):
    back, rows = residuals
    sum_TD = y_ZD[back].reshape(rows, -1, y_ZD.shape[1]).sum(1, dtype=jnp.float32)
    return sum_TD.astype(y_ZD.dtype), None, None


_rows_in_order.defvjp(_rows_in_order_forward, _rows_in_order_backward)


class MoE(nnx.Module):
    """Routed experts beside experts that every token shares."""

    def __init__(
        self, config: RouterConfig, hidden_size: int, wide: int, shared: MLP | None, layers: int
    ):
        self.gate = Router(config, hidden_size, layers)
        self.experts = Experts(hidden_size, wide, config.n_routed_experts, layers)
        self.shared_experts = shared

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        real_BT: Bool[Array, "B T"],
        layout: Layout | None,
        dropout: Dropout | None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Run the experts; returns their output and how the routed ones shared the work."""
        routing, work = self.gate(x_BTD, real_BT)
        out_BTD = self.experts(x_BTD, routing, layout)
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(x_BTD, dropout)
        return out_BTD, work
