# SPDX-License-Identifier: Apache-2.0
"""What every command puts together the same way: a run's model, and what of it trains.

In: a `RunConfig`'s sections. Out: an `Assembly`: the opened checkpoint, the abstract model with
its adapter attached, the partition and the mesh; and from it the parameters on their devices.
Nothing is allocated before `load_frozen` and `load_trainable`. Not done here: data, optimizer
state, training.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
from jax.sharding import Mesh
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from dsjax import adapters
from dsjax.checkpoint import Checkpointer, from_newest
from dsjax.checksums import checksums
from dsjax.config import AdapterSection, ModelSection, ObjectiveSection, RunConfig
from dsjax.convert import Source, check_coverage, load_base, open_checkpoint
from dsjax.errors import ConfigError, raise_all
from dsjax.models import Model, build, predict_ahead
from dsjax.objectives.requirements import check_biases, check_objective, check_prediction
from dsjax.partition import Params, Partition, decide
from dsjax.sharding import check_experts, leaf_shardings, make_mesh
from dsjax.source import source_digest


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
    spec: adapters.Spec | None
    partition: Partition
    mesh: Mesh
    carried: list[str]
    adapter_path: str | None

    @property
    def shardings(self) -> dict[str, Any]:
        """Sharding of every leaf by path."""
        return leaf_shardings(self.partition.leaves, self.mesh)

    def contents(self) -> dict[str, str]:
        """What tells the model and the adapter on disk from others, by their keys."""
        adapter = "none"
        if self.adapter_path is not None and self.spec is not None:
            adapter = adapters.peft_files.contents(self.adapter_path, self.spec)
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
    parts = assemble_model(
        config.model, config.adapter, freeze, mesh, config.objective, weights=weights
    )
    check_experts(parts.partition.leaves, mesh)
    return parts


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
    objective = objective or ObjectiveSection()
    source = open_checkpoint(section.path, section.revision, weights, adapter.path, checked=True)
    model = build(source.config, section.dtype)
    spec, left_out = adapters.fitted(adapter, adapters.resolve(adapter), model)
    if left_out and jax.process_index() == 0:
        print(left_out, file=sys.stderr)
    check_objective(objective, model, spec.peft_type if spec else None)
    if objective.mtp_loss_weight:
        predict_ahead(model)
    carried = _check_weights(objective, model, source) if weights else []
    if spec is not None:
        adapters.check_targets(adapter, spec, model)
    adapters.attach(model, spec)
    partition = decide(
        model,
        freeze=freeze,
        dtype=section.dtype,
        param_dtype=section.param_dtype,
        balance=objective.bias_update_speed > 0,
    )
    if weights and adapter.path is not None and spec is not None:
        adapters.check_params(adapter.path, model, spec, partition.leaves, source.read)
    return Assembly(section, source, model, spec, partition, mesh, carried, adapter.path)


def _check_weights(objective: ObjectiveSection, model: Model, source: Source) -> list[str]:
    """Hold the model against the checkpoint's tensors; returns those that it only carries."""
    if objective.mtp_loss_weight:
        check_prediction(objective, model, source.tensors)
    carried = check_coverage(source, model)
    check_biases(objective, model, source.tensors)
    return carried


CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, in its output directory."""

Progress = Callable[[int, int], None]
"""Told the bytes done so far and in all."""


def silent(done: int, total: int) -> None:
    """Tell nobody."""


def load_frozen(parts: Assembly, seed: int, progress: Progress = silent) -> Params:
    """The frozen arrays on their devices."""
    return _load(parts, parts.partition.frozen, seed, progress)


def load_trainable(parts: Assembly, seed: int, progress: Progress = silent) -> Params:
    """The first values of the trainable arrays on their devices."""
    return _load(parts, parts.partition.trainable, seed, progress)


def _load(parts: Assembly, paths: Sequence[str], seed: int, progress: Progress) -> Params:
    shardings = parts.shardings
    leaves = {path: parts.partition.leaves[path] for path in paths}
    base = {path: leaf for path, leaf in leaves.items() if leaf.kind == "base"}
    own = {path: leaf for path, leaf in leaves.items() if leaf.kind != "base"}
    params = load_base(parts.source, parts.model, base, shardings, progress) if base else {}
    params |= adapters.initial_params(parts.model, parts.spec, own, shardings, seed)
    trained = any(leaf.kind == "adapter" for leaf in own.values())
    if parts.adapter_path is not None and parts.spec is not None and trained:
        params |= adapters.load_params(parts.adapter_path, parts.model, parts.spec, own, shardings)
    return params


class Restored(NamedTuple):
    """What a checkpoint holds of a run.

    Attributes:
        step: the optimizer step.
        trainable: the trained arrays.
        meta: what was saved beside the state.
    """

    step: int
    trainable: Params
    meta: dict[str, Any]


def restore_trained(run: Path, config: RunConfig, parts: Assembly) -> Restored:
    """The trained arrays of a run's newest complete checkpoint; the run may be alive.

    Raises:
        ConfigError: the run has no complete checkpoint, or one of another model.
    """
    return from_newest(lambda: _restore_newest(run, config, parts))


def _restore_newest(run: Path, config: RunConfig, parts: Assembly) -> Restored:
    folder = run / CHECKPOINTS
    checkpointer = Checkpointer(folder, config.checkpoint, read_only=True)
    step = checkpointer.latest() if folder.is_dir() else None
    if step is None:
        raise ConfigError(f"{folder}: got no complete checkpoint, expected one; train first")
    meta = read_meta(checkpointer, step)
    check_contents(parts.contents(), meta["contents"], run)
    shardings, leaves = parts.shardings, parts.partition.leaves
    abstract = {
        path: jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype, sharding=shardings[path])
        for path in parts.partition.trainable
    }
    state = checkpointer.restore(step, {"trainable": abstract}, partial=True)
    checkpointer.close()
    return Restored(step, state["trainable"], meta)


class _Sums(BaseModel, strict=True, extra="forbid"):
    loss: float
    weight: float
    correct: float
    tokens: int


class _Meter(BaseModel, strict=True):
    since_log: _Sums
    run: _Sums


class _Meta(BaseModel, strict=True):
    """What a run saves beside its state (`loop`), as those who go on with it need it."""

    started: Annotated[str, AfterValidator(datetime.fromisoformat)]
    contents: dict[str, str]
    frozen: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]
    meter: _Meter | None = None


def read_meta(checkpointer: Checkpointer, step: int) -> dict[str, Any]:
    """What a run saved beside its state.

    Raises:
        ConfigError: it is damaged, or is not what this version's runs save.
    """
    meta = checkpointer.meta(step)
    try:
        _Meta.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{checkpointer.directory / str(step)}: got a checkpoint whose "
            f"{'.'.join(map(str, first['loc']))} is not what this version saves ({first['msg']}), "
            "expected one that it can go on with; finish the run with the version that began it, "
            "or choose another output_dir"
        ) from error
    return meta


def check_contents(found: Mapping[str, str], began: Mapping[str, str], run: Path) -> None:
    """Refuse to read anything else than a run began with.

    Args:
        found: digests of what lies there now, by the keys that name it.
        began: those that the run's checkpoint holds.
        run: the run's directory, for the message.
    """
    raise_all(
        f"{key}: got other contents ({found[key]}) than those with which the run in {str(run)!r} "
        f"began ({began.get(key)}), expected the same; restore them, or choose another output_dir"
        for key in found
        if found[key] != began.get(key)
    )


def frozen_sums(frozen: Params) -> dict[str, list[str]]:
    """Dtype and checksum of every frozen array."""
    sums = checksums(dict(frozen))
    return {path: [str(array.dtype), sums[path]] for path, array in frozen.items()}


def check_frozen(frozen: Params, began: Mapping[str, Sequence[str]], run: Path) -> None:
    """Hold the frozen arrays, all of their numbers, against those that a run began with.

    Arrays that are held in another dtype, or that only one of the two has, are not compared.
    """
    found = frozen_sums(frozen)
    other = [
        path
        for path, (dtype, value) in found.items()
        if path in began and began[path][0] == dtype and began[path][1] != value
    ]
    if other:
        more = f" and {len(other) - 1} more have" if len(other) > 1 else " has"
        raise ConfigError(
            f"model.path: got a checkpoint whose {other[0]}{more} other numbers than when the run "
            f"in {str(run)!r} began, expected the same weights; restore them, or choose another "
            "output_dir"
        )
