# SPDX-License-Identifier: Apache-2.0
"""What every command puts together the same way: a run's model, and what of it trains.

In: a `RunConfig`'s sections. Out: an `Assembly`: the opened checkpoint, the abstract model with
its adapter attached, the partition and the mesh; and from it the parameters on their devices.
Nothing is allocated before `load_frozen` and `load_trainable`. Not done here: data, optimizer
state, training.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from dsjax import adapters
from dsjax.adapters.method import AdapterConfig
from dsjax.config import AdapterSection, ModelSection, ObjectiveSection, RunConfig
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import Params, check_experts, leaf_shardings
from dsjax.errors import raise_all
from dsjax.models import Model, Quantization, build
from dsjax.objectives import objective_of
from dsjax.training.partition import Partition, make_partition
from dsjax.weights import peft
from dsjax.weights.adapter import check_params, check_targets, fitted, load_params, resolve
from dsjax.weights.load import Source, check_coverage, load_base, open_checkpoint
from dsjax.weights.source import source_digest


@dataclass(frozen=True, eq=False, repr=False)
class Assembly:
    """A run's model before any array exists.

    Attributes:
        section: which checkpoint, in which precision.
        source: the opened checkpoint.
        model: the abstract module, adapter attached.
        spec: the adapter, None in full training.
        partition: what trains.
        mesh: the devices.
        carried: names of the checkpoint's tensors that are not modelled.
        adapter_path: where the adapter's values come from, None to start afresh.
    """

    section: ModelSection
    source: Source
    model: Model
    spec: AdapterConfig | None
    partition: Partition
    mesh: Mesh
    carried: list[str]
    adapter_path: str | None

    @property
    def shardings(self) -> dict[str, Any]:
        """Sharding of every leaf by path."""
        return leaf_shardings(self.partition.leaves, self.mesh)

    def contents(self) -> dict[str, str]:
        """Return what tells the model and the adapter on disk from others, by their keys."""
        adapter = "none"
        if self.adapter_path is not None and self.spec is not None:
            adapter = peft.contents(self.adapter_path, self.spec)
        return {"model.path": source_digest(self.source), "adapter.path": adapter}


def assemble(
    config: RunConfig, devices: Sequence[Any] | None = None, *, weights: bool = True
) -> Assembly:
    """Open, build, attach and decide, in this order; every refusal of these stages comes here.

    Args:
        config: the run's.
        devices: of the mesh, all that there are if None.
        weights: False leaves the checkpoint's tensors alone: config.json is enough to plan.
    """
    mesh = make_mesh(config.mesh, devices)
    freeze = list(config.training.freeze)
    setup = assemble_model(
        config.model, config.adapter, freeze, mesh, config.objective, weights=weights
    )
    check_experts(setup.partition.leaves, mesh)
    return setup


def assemble_model(
    section: ModelSection,
    adapter: AdapterSection,
    freeze: list[str],
    mesh: Mesh,
    objective: ObjectiveSection | None = None,
    *,
    weights: bool = True,
) -> Assembly:
    """`assemble` from the sections that a model needs; None for a model that is only used."""
    options = objective or ObjectiveSection()
    own = objective_of(options)
    source = open_checkpoint(section.path, section.revision, weights, adapter.path, checked=True)
    model = build(source.config, section.dtype, quantization_of(section))
    spec, left_out = fitted(adapter, resolve(adapter), model)
    if left_out and jax.process_index() == 0:
        print(left_out, file=sys.stderr)
    raise_all(own.problems(options, model, spec.peft_type if spec else None))
    own.prepare(options, model)
    if weights:
        raise_all(own.tensor_problems(options, model, source.tensors))
    carried = check_coverage(source, model) if weights else []
    if spec is not None:
        check_targets(adapter, spec, model)
    adapters.attach(model, spec)
    partition = make_partition(
        model,
        freeze=freeze,
        dtype=section.dtype,
        param_dtype=section.param_dtype,
        balance=own.moves_biases(options),
    )
    rates = adapters.lr_factors(spec, partition.trainable)
    partition = replace(partition, lr_factors=rates)
    if weights and adapter.path is not None and spec is not None:
        check_params(adapter.path, model, spec, partition.leaves, source.read)
    return Assembly(section, source, model, spec, partition, mesh, carried, adapter.path)


def quantization_of(section: ModelSection) -> Quantization | None:
    """Return how frozen weights are held in fewer bits; None: they are not."""
    if section.quantization is None:
        return None
    return Quantization(
        section.quantization,
        section.quantization_double,
        section.quantization_experts,
        section.quantization_skip_modules,
    )


ByteProgress = Callable[[int, int], None]
"""Told the bytes done so far and in all."""


def no_byte_progress(done: int, total: int) -> None:
    """Tell nobody."""


def load_frozen(setup: Assembly, seed: int, progress: ByteProgress = no_byte_progress) -> Params:
    """Load the frozen arrays onto their devices."""
    return _load(setup, setup.partition.frozen, {}, seed, progress)


def load_trainable(
    setup: Assembly, frozen: Params, seed: int, progress: ByteProgress = no_byte_progress
) -> Params:
    """Make the first values of the trainable arrays on their devices.

    Args:
        setup: what is loaded.
        frozen: the frozen arrays, which an adapter's first values may be computed from.
        seed: of what is random.
        progress: told the bytes read so far and in all.
    """
    return _load(setup, setup.partition.trainable, frozen, seed, progress)


def _load(
    setup: Assembly, paths: Sequence[str], loaded: Params, seed: int, progress: ByteProgress
) -> Params:
    shardings = setup.shardings
    leaves = {path: setup.partition.leaves[path] for path in paths}
    base = {path: leaf for path, leaf in leaves.items() if leaf.kind == "base"}
    own = {path: leaf for path, leaf in leaves.items() if leaf.kind != "base"}
    params = load_base(setup.source, setup.model, base, shardings, progress) if base else {}
    params |= adapters.initial_params(
        setup.model, setup.spec, own, shardings, seed, {**loaded, **params}
    )
    trained = any(leaf.kind == "adapter" for leaf in own.values())
    if setup.adapter_path is not None and setup.spec is not None and trained:
        params |= load_params(setup.adapter_path, setup.model, setup.spec, own, shardings)
    return params
