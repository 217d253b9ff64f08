# SPDX-License-Identifier: Apache-2.0
"""Logits of a model that does not fit on the devices: its layers are loaded one after the other.

In: an opened checkpoint, and models of it that differ in their adapters alone. Out: the logits of
some tokens, of each. Beside the adapters' arrays there is one layer at a time, held as an
unquantized model holds it. Not done here: which tokens, and what the logits are held against
(`verify`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dsjax.distributed.mesh import replicated
from dsjax.distributed.sharding import Leaf, Params, leaf_shardings, make_layout
from dsjax.models import Model, entries_of
from dsjax.models.decoder import LayerInputs, run_stack
from dsjax.models.ops.attention import Tokens
from dsjax.models.rope import positions_like
from dsjax.models.weight_rules import Entry
from dsjax.weights.load import load_entries
from dsjax.weights.source import Source

EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, eq=False, repr=False)
class Variant:
    """A model without quantization, and the adapter in its slots.

    Attributes:
        model: the abstract module.
        leaves: its base parameters.
        adapter: the adapter's arrays by path; empty without one.
    """

    model: Model
    leaves: Mapping[str, Leaf]
    adapter: Params


def layerwise_logits(
    source: Source,
    variants: Sequence[Variant],
    mesh: Mesh,
    ids: Int[Array, "B T"],
    dtype: str,
) -> list[Float[np.ndarray, "T V"]]:
    """Compute the logits of the first row of tokens.

    Args:
        source: the checkpoint; its weights are read once, whatever the number of variants.
        variants: models of it.
        mesh: the devices.
        ids: tokens, on their devices.
        dtype: of the activations.
    """
    model, leaves = variants[0].model, variants[0].leaves
    entries = [entry for entry in entries_of(model) if not entry.copy]
    load = partial(_load, source, entries, mesh)
    stacks = tuple(f"model.{stack}." for stack in model.model.stacks)
    ends = load({path: leaf for path, leaf in leaves.items() if not path.startswith(stacks)}, None)
    states, done = [_embedded(model, ends, ids, dtype)] * len(variants), 0
    for prefix, block in zip(stacks, model.model.blocks(), strict=True):
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(prefix)}
        runs = [_layer(variant, prefix, done, mesh) for variant in variants]
        for number in range(block.layers):
            arrays = load(own, number)
            states = [run(arrays, number, x) for run, x in zip(runs, states, strict=True)]
            jax.block_until_ready(states)
            for array in arrays.values():
                array.delete()
        done += block.layers
    return [
        np.asarray(_head(variant, mesh)(ends, variant.adapter, x_BTD), np.float32)
        for variant, x_BTD in zip(variants, states, strict=True)
    ]


def _embedded(model: Model, ends: Params, ids: jax.Array, dtype: str) -> jax.Array:
    def embed(ends: Params, ids: jax.Array) -> jax.Array:
        return _module(model.model.embed_tokens, EMBEDDING, ends)(ids, jnp.dtype(dtype))

    return jax.jit(embed)(ends, ids)


def _load(
    source: Source,
    entries: Sequence[Entry],
    mesh: Mesh,
    leaves: Mapping[str, Leaf],
    layer: int | None,
) -> Params:
    """Read parameters; of a stack's those of one layer, as a stack of one."""
    if layer is not None:
        entries = [
            replace(entry, index=(0, *entry.index[1:]))
            for entry in entries
            if entry.path in leaves and entry.index[0] == layer
        ]
        leaves = {p: replace(leaf, shape=(1, *leaf.shape[1:])) for p, leaf in leaves.items()}
    return load_entries(source, entries, leaves, leaf_shardings(leaves, mesh), lambda *_: None)


def _module(module: nnx.Module, prefix: str, arrays: Params) -> Any:
    """Put into a part of the model those arrays whose paths begin with its own."""
    own: dict[Any, jax.Array] = {
        tuple(path.removeprefix(f"{prefix}.").split(".")): array
        for path, array in arrays.items()
        if path.startswith(f"{prefix}.")
    }
    return nnx.merge(nnx.graphdef(module), nnx.from_flat_state(own))


def _layer(
    variant: Variant, prefix: str, before: int, mesh: Mesh
) -> Callable[[Params, int, jax.Array], jax.Array]:
    """Return (a layer's arrays, its number in the stack, activations) -> activations."""
    name = prefix.removesuffix(".")
    block = getattr(variant.model.model, name.removeprefix("model."))
    layout, windows = make_layout(mesh), variant.model.windows()

    @jax.jit
    def run(base: Params, adapter: Params, number: jax.Array, x_BTD: jax.Array) -> jax.Array:
        one = partial(jax.lax.dynamic_slice_in_dim, slice_size=1)
        own = {path: one(array, number) for path, array in adapter.items()}
        position = positions_like(x_BTD[..., 0])
        tokens = Tokens(position, jnp.ones_like(position))
        shared, _ = variant.model.stack_inputs(tokens, layout=layout)
        window = None if windows is None else one(windows, before + number)
        inputs = LayerInputs(window=window, number=None, cache=None)
        return run_stack(_module(block, name, base | own), x_BTD, shared, inputs, "none")[0]

    held = {path: array for path, array in variant.adapter.items() if path.startswith(prefix)}
    return lambda base, number, x_BTD: run(base, held, jnp.int32(number), x_BTD)


def _head(variant: Variant, mesh: Mesh) -> Callable[[Params, Params, jax.Array], jax.Array]:
    """Return (arrays outside of stacks, the adapter's, activations) -> the first row's logits."""
    model = variant.model

    def norm(ends: Params, x_BTD: jax.Array) -> jax.Array:
        return _module(model.model.norm, "model.norm", ends)(x_BTD)[0]

    def logits(ends: Params, adapter: Params, x_TD: jax.Array) -> jax.Array:
        if model.lm_head is None:
            return _module(model.model.embed_tokens, EMBEDDING, ends).attend(x_TD)
        return _module(model.lm_head, "lm_head", ends | adapter)(x_TD)

    # Two programs, as in `verify.sample_logits`.
    last = jax.jit(norm, out_shardings=replicated(mesh))
    head = jax.jit(logits, out_shardings=replicated(mesh))
    return lambda ends, adapter, x_BTD: head(ends, adapter, last(ends, x_BTD))
