# SPDX-License-Identifier: Apache-2.0
"""FLOPs of one training token: what the gradients need, and what the step executes for them.

In: the abstract model with its adapter, the partition, the length of the rows. Out: two numbers,
derived in docs/throughput.md. Not done here: peaks (`distributed.devices`), measuring
time (`meter`).

Only matrix products count, two FLOPs for a multiplication and its addition. Norms, rope, softmax,
the lookup of embeddings and the optimizer do not.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dsjax.distributed.sharding import Leaf
from dsjax.models import Model
from dsjax.models.decoder import Block
from dsjax.models.ops.attention import QUERY_BLOCK
from dsjax.training.partition import Partition

_EMBEDDING, _NORM, _HEAD, _AHEAD = "model.embed_tokens", "model.norm", "lm_head", "mtp"

_AGAIN = {
    "linear": ("names", "full"),
    "kept": ("full",),
    "down_proj": (),
    "experts": ("dots", "names", "full"),
}
"""Kind of product -> the remat policies under which a block computes it again.

`names` keeps what o_proj and the projections to latents give. What a dense down_proj gives is not
needed again in its own block; what the experts' give is, for the gradient of their weights in the
sum. `dots` keeps all products of weights but the experts'.
"""


class TokenFlops(NamedTuple):
    """FLOPs of one training token.

    Attributes:
        needed: by the loss and the gradients of what trains; MFU counts these.
        executed: all that run, recomputation and masked-out work included; these take the time.
    """

    needed: float
    executed: float


def token_flops(
    model: Model, partition: Partition, length: int, remat: str, experts_in_chunks: bool = False
) -> TokenFlops:
    """FLOPs of one training token.

    Needed are, for every weight that the token meets, 2 FLOPs forward, as many for the gradient of
    the product's input from the lowest layer up in which something trains, and as many for the
    gradient of the weight where it trains; attention likewise, with the keys that a query sees:
    half a row (Chowdhery et al. 2022, appendix B, with the causal half).

    Executed are also: what the blocks compute again; the head once more, whose logits are never
    kept; the scores once more in rows longer than `QUERY_BLOCK`; under any policy the experts where
    rows are taken in chunks (`models.moe.tokens_at_once`); gradients in the frozen layers of
    a stack that trains in part, since a scan treats its layers alike; the keys that V3.2's indexer
    leaves out, which are masked and not skipped. The causal half is left out here too: kernels
    skip it, and only the plain path, on CPU, does not.

    Args:
        model: abstract, adapters attached.
        partition: what trains.
        length: tokens of a row.
        remat: `training.gradient_checkpointing`.
        experts_in_chunks: whether the rows are longer than `models.moe.tokens_at_once`.
    """
    shares = _backward_shares(model, partition)
    step = _Step(model, partition, length, remat, experts_in_chunks, shares)
    products = [*_of_weights(step), *_of_attention(step)]
    return TokenFlops(*(float(sum(column)) for column in zip(*products, strict=True)))


@dataclass(frozen=True)
class _Step:
    """What decides which products there are; `shares` is `_backward_shares`'s."""

    model: Model
    partition: Partition
    length: int
    remat: str
    experts_in_chunks: bool
    shares: dict[str, float]

    @property
    def selects(self) -> bool:
        """Whether V3.2's indexer has a choice to make."""
        indexer = getattr(self.model.config, "indexer", None)
        return indexer is not None and self.length > indexer.index_topk

    def again(self, kind: str, part: str) -> bool:
        """Whether the backward pass computes a kind of product again."""
        again = self.remat in _AGAIN[kind] or (kind == "experts" and self.experts_in_chunks)
        return self.shares[part] > 0 and again


def _product(
    forward: float, shares: tuple[float, float], again: int, whole: float | None = None
) -> TokenFlops:
    """One product: what its forward pass and its gradients need, and what is executed of it.

    Args:
        forward: FLOPs of the forward pass.
        shares: of the layers that need the gradient of the input, and that of the weight; each
            gradient is executed for all layers or for none.
        again: how often the backward pass computes it again.
        whole: FLOPs of the forward pass as it is executed, where that is more.
    """
    times = 1 + again + sum(map(math.ceil, shares))
    return TokenFlops(forward * (1 + sum(shares)), times * (whole or forward))


def _backward_shares(model: Model, partition: Partition) -> dict[str, float]:
    """For each part of the model, the share of its layers that the backward pass has to cross.

    All layers where something below trains, none where nothing does, else those from the lowest one
    up that trains. That one counts whole, what lies below its lowest trained weight included.
    """
    stacks = [f"model.{name}" for name in model.model.stacks]
    shares, below = {}, False
    for part in (_EMBEDDING, *stacks, _NORM, _AHEAD):
        layers = [
            _trained_layers(model, partition, path)
            for path in partition.gradient_params
            if path.startswith(f"{part}.")
        ]
        crossed = np.maximum.accumulate(np.any(layers, axis=0)) if layers else np.zeros(1)
        shares[part] = 1.0 if below else float(crossed.mean())
        below = below or bool(layers)
    return shares | {_HEAD: shares[_NORM]}


def _trained_layers(model: Model, partition: Partition, path: str) -> np.ndarray:
    """Which layers of a stack train a leaf: [L], one layer outside a stack."""
    leaf = partition.leaves[path]
    layers = leaf.shape[0] if "layers" in leaf.axes else 1
    trained = partition.layer_masks.get(path, np.ones(layers, bool))
    if ".lora_" in path:  # rank 0: a layer, or an expert of it, without an adapter
        module: Any = functools.reduce(getattr, path.split(".")[:-1], model)
        trained = np.asarray(module.ranks) > 0
    return np.asarray(trained.reshape(layers, -1).any(axis=1))


def _of_weights(step: _Step) -> Iterator[TokenFlops]:
    """Count the products with every weight."""
    head = _EMBEDDING if step.model.lm_head is None else _HEAD
    for path, leaf in step.partition.leaves.items():
        if path.startswith(f"{head}.") and _is_matrix(leaf):
            yield _of_weight(step, path, _HEAD, 1)
            if step.model.mtp is not None:
                yield _of_weight(step, path, _AHEAD, 1)
        elif ".indexer." in path and _is_matrix(leaf):
            again = step.again("linear", _part(path))
            if step.selects:  # without gradients
                yield _product(2.0 * leaf.count, (0.0, 0.0), again)
        elif not path.startswith(f"{_EMBEDDING}.") and _is_matrix(leaf):
            in_block = not path.startswith(f"{_AHEAD}.eh_proj.")
            again = in_block and step.again(_kind(path, leaf), _part(path))
            yield _of_weight(step, path, _part(path), again)


def _is_matrix(leaf: Leaf) -> bool:
    """Whether a leaf is multiplied with: no norm, no bias, no prefix."""
    return sum(axis not in ("layers", "experts") for axis in leaf.axes) == 2


def _part(path: str) -> str:
    """Name the part of the model, as `_backward_shares` has them, that a leaf belongs to."""
    return _AHEAD if path.startswith(f"{_AHEAD}.") else ".".join(path.split(".")[:2])


def _kind(path: str, leaf: Leaf) -> str:
    """Name the row of `_AGAIN`. What an adapter's first factor gives is needed by the second."""
    if "experts" in leaf.axes:
        return "experts"
    names = set() if path.endswith("lora_A") else set(path.split("."))
    if names & {"o_proj", "q_a_proj", "kv_a_proj_with_mqa"}:
        return "kept"
    return "down_proj" if "down_proj" in names else "linear"


def _of_weight(step: _Step, path: str, part: str, again: int) -> TokenFlops:
    leaf, config = step.partition.leaves[path], step.model.config
    met = 1.0
    if "experts" in leaf.axes:
        met = config.router.num_experts_per_tok / config.router.n_routed_experts
    of_input, of_weight = step.shares[part], 0.0
    if path in step.partition.gradient_params:
        of_weight = step.partition.trainable_count(path) / leaf.count
    if leaf.kind == "adapter":  # only in layers that train; the second factor's input always does
        of_input = 1.0 if path.endswith("lora_B") else float(math.ceil(of_input))
    # The padding of unequal adapter ranks is multiplied with too. (A stored matrix's shape is that
    # of what holds it.)
    whole = math.prod(leaf.shape) if leaf.kind == "adapter" else leaf.count
    return _product(2 * met * leaf.count, (of_input, of_weight), again, 2 * met * whole)


def _of_attention(step: _Step) -> Iterator[TokenFlops]:
    """Count the products of queries with keys and of weights with values, in every stack."""
    windows = list(step.model.config.windows)
    for name, block in zip(step.model.model.stacks, step.model.model.blocks(), strict=True):
        here, windows = windows[: block.layers], windows[block.layers :]
        yield from _of_stack(step, f"model.{name}", f"model.{name}", block, here)
    if step.model.mtp is not None:
        yield from _of_stack(step, _AHEAD, f"{_AHEAD}.block", step.model.mtp.block, [None])


def _of_stack(
    step: _Step, part: str, path: str, block: Block, windows: list[int | None]
) -> Iterator[TokenFlops]:
    config, share = step.model.config, step.shares[part]
    prefix = block.self_attn.prefix
    before = 0 if prefix is None else prefix.length
    seen = sum(before + _mean_keys(step.length, window) for window in windows)
    chosen = seen
    if step.selects:
        chosen = len(windows) * _mean_keys(step.length, config.indexer.index_topk)
    # The attended values are needed again by o_proj: to give, or for a gradient of its weights.
    learns = any(p.startswith(f"{path}.self_attn.o_proj.") for p in step.partition.gradient_params)
    values_again = step.remat == "full" or (step.remat != "none" and learns)
    in_blocks = step.length > QUERY_BLOCK
    scores_again = (values_again or (step.remat != "none" and not in_blocks)) + in_blocks
    qk_size, v_size = config.head_sizes
    runs = share > 0
    for size, again in ((qk_size, scores_again), (v_size, values_again)):
        per_key = 2.0 * config.num_attention_heads * size
        yield _product(per_key * chosen, (share, share), runs and again, per_key * seen)
    if step.selects:
        i = config.indexer
        forward = 2.0 * i.index_n_heads * (i.index_head_dim + 1) * seen
        yield _product(forward, (0.0, 0.0), runs and scores_again)


def _mean_keys(length: int, most: int | None) -> float:
    """Keys that a token sees on average: half a row, fewer where it sees `most` at most."""
    if most is None or most >= length:
        return length / 2
    return most - most**2 / (2 * length)
