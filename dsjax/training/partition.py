# SPDX-License-Identifier: Apache-2.0
"""The one decision which parameters train; everything after it receives the result.

In: an abstract model, with its adapters attached, and the freeze patterns. Out: a `Partition`:
every leaf with the dtype it is held in, the trainable paths, the frozen paths, and the module to
put both back into. Not done here: gradients, sharding, values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config.patterns import fullmatch
from dsjax.distributed.sharding import Leaf, Params
from dsjax.errors import ConfigError, nearest, raise_all
from dsjax.models import Model, base_shapes, entries_of
from dsjax.models.parameters import AdapterBuffer, AdapterParam
from dsjax.models.storage import StoredParam


@dataclass(frozen=True)
class Partition:
    """Which leaves train.

    Attributes:
        graphdef: the module without its arrays.
        leaves: every leaf by path.
        trainable: paths that a step changes and a run saves.
        frozen: all other paths.
        layer_masks: for a trained stack of which a part is frozen, which layers (and experts)
            train.
        router_biases: those trainable paths that move by the experts' loads, and have neither
            gradient nor optimizer state.
        kept: those trainable paths that no step changes, first values that others count from.
        lr_factors: what the learning rate of some trainable paths is multiplied by.
    """

    graphdef: Any
    leaves: Mapping[str, Leaf]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    layer_masks: Mapping[str, np.ndarray]
    router_biases: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    lr_factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def gradient_params(self) -> tuple[str, ...]:
        """The trainable paths that get gradients and optimizer state."""
        without = {*self.router_biases, *self.kept}
        return tuple(path for path in self.trainable if path not in without)

    def merge(self, trainable: Params, frozen: Params) -> Model:
        """Put arrays into the module."""
        return unflatten(self.graphdef, {**frozen, **trainable})

    def for_inference(self, dtype: str) -> "Partition":
        """Return the partition of a model that is only used, base parameters held in `dtype`."""
        wanted = jnp.dtype(dtype)
        held = {
            path: leaf if leaf.pinned or leaf.kind != "base" else replace(leaf, dtype=wanted)
            for path, leaf in self.leaves.items()
        }
        return Partition(self.graphdef, held, (), tuple(held), {})

    def trainable_count(self, path: str) -> int:
        """Parameters of one trainable leaf that really train."""
        if path in self.kept:
            return 0
        mask = self.layer_masks.get(path)
        count = self.leaves[path].count
        return count if mask is None else count // mask.size * int(mask.sum())

    def counts(self) -> tuple[int, int]:
        """Trainable parameters, and all."""
        everything = sum(
            leaf.count
            for path, leaf in self.leaves.items()
            if leaf.kind != "buffer" and path not in self.kept
        )
        return sum(self.trainable_count(path) for path in self.trainable), everything


def unflatten(graphdef: Any, params: Mapping[str, Any]) -> Model:
    """Put arrays, by dotted path, into a module."""
    state: dict[Any, Any] = {tuple(path.split(".")): value for path, value in params.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(state))


def flatten(model: Model) -> dict[str, Any]:
    """Return the arrays of a module by dotted path."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable[...] for path, variable in flat}


def make_partition(
    model: Model,
    *,
    freeze: Sequence[str] = (),
    dtype: str = "float32",
    param_dtype: str | None = None,
    balance: bool = False,
) -> Partition:
    """Decide what trains: the adapters if there are any, else the base without the frozen part.

    Args:
        model: abstract, adapters attached.
        freeze: `training.freeze`; each pattern is a regular expression that has to cover whole
            dotted components of a tensor's name (`embed_tokens`, `model.layers.[01]`).
        dtype: what frozen base parameters are held in (`model.dtype`).
        param_dtype: what trained base parameters are held in (`model.param_dtype`); float32 if
            None.
        balance: whether the routers' correction biases move (`objective.bias_update_speed`).

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    variables = nnx.to_flat_state(nnx.state(model))
    kinds = {".".join(map(str, path)): variable for path, variable in variables}
    has_adapter = any(isinstance(v, AdapterParam) for v in kinds.values())
    if has_adapter and freeze:
        raise ConfigError(
            f"training.freeze: got {list(freeze)!r} with an adapter, expected []; with an adapter "
            "all weights of the model are frozen"
        )
    masks = _layer_masks(model, freeze)
    router_biases = _router_biases(kinds) if balance and not has_adapter else ()
    kept = tuple(p for p, v in kinds.items() if _kind(v) == "adapter" and not _moves(v))
    for path, variable in kinds.items():
        if not _moves(variable) and path not in (*router_biases, *kept):
            masks[path] = np.zeros_like(masks.get(path, False))  # no mask: it only helps another
    leaves, trainable = {}, []
    for path, variable in kinds.items():
        kind = _kind(variable)
        trains = kind == "adapter" if has_adapter else bool(masks[path].any())
        held = (param_dtype or "float32") if trains else dtype
        held = variable.get_metadata().get("dtype", held if kind == "base" else "float32")
        leaves[path] = _leaf(variable, kind, jnp.dtype(held))
        if trains:
            trainable.append(path)
    if not set(trainable) - set(router_biases):
        raise ConfigError(
            f"training.freeze: got {list(freeze)!r}, which freezes every tensor, expected at least "
            "one left to train; remove a pattern"
        )
    if router_biases and not set(trainable) & set(router_biases):
        raise ConfigError(
            f"training.freeze: got {list(freeze)!r}, which freezes every e_score_correction_bias, "
            "expected at least one left to move; or set objective.bias_update_speed=0"
        )
    partial = {} if has_adapter else {p: m for p, m in masks.items() if m.any() and not m.all()}
    frozen = tuple(path for path in leaves if path not in set(trainable))
    moved = tuple(path for path in trainable if path in router_biases)
    return Partition(nnx.graphdef(model), leaves, tuple(trainable), frozen, partial, moved, kept)


def _router_biases(variables: Mapping[str, nnx.Variable]) -> tuple[str, ...]:
    """Paths of what the experts' loads may move."""
    return tuple(p for p, v in variables.items() if v.get_metadata().get("balances", False))


def _moves(variable: nnx.Variable) -> bool:
    """Whether gradients reach it."""
    return variable.get_metadata().get("trains", True)


def _kind(variable: nnx.Variable) -> str:
    if isinstance(variable, AdapterParam):
        return "adapter"
    return "buffer" if isinstance(variable, AdapterBuffer) else "base"


def _leaf(variable: nnx.Variable, kind: str, dtype: jnp.dtype) -> Leaf:
    metadata = variable.get_metadata()
    shape, pinned = tuple(variable.shape), "dtype" in metadata
    count = metadata.get("count", math.prod(shape))
    quantized = isinstance(variable, StoredParam)
    return Leaf(shape, metadata["axes"], dtype, kind, count, pinned, quantized)


def _layer_masks(model: Model, freeze: Sequence[str]) -> dict[str, np.ndarray]:
    """For every base parameter, which of its layers (and experts) train: [], [L] or [L, E]."""
    entries = [entry for entry in entries_of(model) if not entry.copy]
    names = [entry.hf for entry in entries]
    # Whole dotted components: before the first and after the last stands a dot, or nothing.
    wanted = {f"(?:.*\\.)?(?:{pattern})(?:\\..*)?": pattern for pattern in freeze}
    covered, slow = fullmatch(list(wanted), names) if freeze else ({}, {})
    problems = [
        f"training.freeze: got {wanted[whole]!r}, expected a regular expression ({problem}); "
        "write .* where a shell would take *"
        for whole, problem in slow.items()
    ]
    problems += [
        f"training.freeze: got {wanted[whole]!r}, which matches no tensor; "
        f"{nearest(wanted[whole], names)}"
        for whole, found in covered.items()
        if not found
    ]
    raise_all(problems)
    frozen = frozenset().union(*covered.values())
    shapes = base_shapes(model)
    lead = {entry.path: len(entry.index) for entry in entries}
    masks = {path: np.ones(shape[: lead[path]], bool) for path, shape in shapes.items()}
    for entry in entries if frozen else ():
        masks[entry.path][entry.index] = entry.hf not in frozen
    return masks


def report(partition: Partition) -> list[tuple[str, str, str, int, int]]:
    """Tabulate what trains: (module or array, shapes, dtype, trainable, all) parameters.

    A row for each kind of module that has an adapter, and for each other array; where layers are
    stacked, the shapes begin with how many there are.
    """
    rows: dict[tuple[str, str], list[tuple[str, Leaf, int]]] = {}
    for path in partition.leaves:
        if path in partition.trainable and path not in partition.kept:
            leaf, count = partition.leaves[path], partition.trainable_count(path)
            module, _, name = path.partition(".adapter.")
            rows.setdefault((module, leaf.dtype.name), []).append((name, leaf, count))
    return [
        (
            module,
            ", ".join(f"{name} {_shape(leaf)}".lstrip() for name, leaf, _ in parts),
            dtype,
            sum(count for *_, count in parts),
            sum(leaf.count for _, leaf, _ in parts),
        )
        for (module, dtype), parts in rows.items()
    ]


def _shape(leaf: Leaf) -> str:
    return " x ".join(map(str, leaf.shape))
