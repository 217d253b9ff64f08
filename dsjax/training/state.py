# SPDX-License-Identifier: Apache-2.0
"""What a train step holds and changes: its state, its shapes, its shardings, and their bytes.

In: the configuration and a `Partition`. Out: `StepConfig`, and the `TrainState` of a first step,
abstract or as arrays. Not done here: the step itself (`step`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dsjax.config import ObjectiveSection, RunConfig, TrainingSection
from dsjax.data import Batch
from dsjax.distributed.mesh import num_microbatches, rows_sharding
from dsjax.distributed.sharding import Params, leaf_shardings, shardings_like
from dsjax.models.decoder import POLICIES
from dsjax.objectives import objective_of
from dsjax.objectives.objective import Objective, Sums
from dsjax.training.loss_scale import LossScale, first_loss_scale
from dsjax.training.optimizer import Schedule, decay_mask, make_optimizer, make_schedule
from dsjax.training.partition import Partition


class TrainState(NamedTuple):
    """Everything that a step changes."""

    trainable: Params
    opt_state: Any
    step: Int[Array, ""]
    rng: jax.Array
    loss_scale: LossScale


class StepReport(NamedTuple):
    """What a step tells: sums over its batch, the gradient's norm before clipping, its rate.

    `updates_lost` is the share of the updates that changed nothing of what is held; None where
    all is held in float32.
    """

    sums: Sums
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    loss_scale: Float[Array, ""]
    skipped: Int[Array, ""]
    updates_lost: Float[Array, ""] | None


@dataclass(frozen=True)
class StepConfig:
    """The parts of a step; all static."""

    partition: Partition
    objective: Objective
    options: ObjectiveSection
    optimizer: optax.GradientTransformation
    schedule: Schedule
    mesh: Mesh
    max_grad_norm: float | None
    accumulation: int
    remat: str
    dropout: bool
    float16: bool


def step_config(
    config: RunConfig,
    partition: Partition,
    mesh: Mesh,
    total_steps: int,
    length: int | None = None,
) -> StepConfig:
    """Return the parts of a run's step.

    Args:
        config: the run's.
        partition: what trains.
        mesh: the devices.
        total_steps: of the schedule.
        length: tokens of a row; `data.max_length` where no row has been read.
    """
    objective = objective_of(config.objective)
    assert set(objective.batch_fields) <= set(Batch._fields), "the rows lack what it reads"
    schedule = make_schedule(config.optimizer, total_steps)
    mask = decay_mask(dict.fromkeys(partition.gradient_params))
    return StepConfig(
        partition=partition,
        objective=objective,
        options=config.objective,
        optimizer=make_optimizer(config.optimizer, schedule, mask, partition.lr_factors),
        schedule=schedule,
        mesh=mesh,
        max_grad_norm=config.optimizer.max_grad_norm,
        accumulation=num_microbatches(
            config.training.gradient_accumulation_steps,
            config.training.batch_size,
            length or config.data.max_length,
            mesh,
        ),
        remat=policies_of(config.training)[0],
        dropout=any(leaf.kind == "adapter" for leaf in partition.leaves.values()),
        float16=config.model.dtype == "float16",
    )


def policies_of(training: TrainingSection, earlier: str | None = None) -> Sequence[str]:
    """Return the remat policies to try, until one fits.

    Args:
        training: the run's section.
        earlier: the policy of an earlier start, which found that those before it do not fit.
    """
    if training.gradient_checkpointing != "auto":
        return (training.gradient_checkpointing,)
    return POLICIES[POLICIES.index(earlier or POLICIES[0]) :]


def abstract_state(config: StepConfig) -> TrainState:
    """Return the state's shapes, dtypes and shardings; nothing is allocated."""
    leaves = config.partition.leaves
    trainable = {
        path: jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype)
        for path in config.partition.trainable
    }
    state = jax.eval_shape(lambda t: init_state(t, config, 0), trainable)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, config),
    )


def init_state(trainable: Params, config: StepConfig, seed: int) -> TrainState:
    """Make the state before the first step; moments are float32, sharded like their parameter."""

    def init(trainable: Params) -> tuple[Any, jax.Array, jax.Array, LossScale]:
        key = jax.random.key_data(jax.random.key(seed))
        return (
            config.optimizer.init(gradient_params_f32(trainable, config.partition)),
            jnp.int32(0),
            key,
            first_loss_scale(config.float16),
        )

    by_path = leaf_shardings(config.partition.leaves, config.mesh)
    shapes = jax.eval_shape(init, trainable)
    out = shardings_like(shapes, by_path, config.mesh)
    opt_state, step, rng, loss_scale = jax.jit(init, out_shardings=out)(trainable)
    return TrainState(trainable, opt_state, step, rng, loss_scale)


def state_shardings(state: Any, config: StepConfig) -> Any:
    """Shardings of a `TrainState`, concrete or abstract."""
    by_path = leaf_shardings(config.partition.leaves, config.mesh)
    return shardings_like(state, by_path, config.mesh)


def gradient_params_f32(trainable: Params, partition: Partition) -> Params:
    """Return the parameters that gradients are taken of, in float32."""
    return {path: trainable[path].astype(jnp.float32) for path in partition.gradient_params}


def abstract_frozen(config: StepConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the frozen arrays' shapes, dtypes and shardings."""
    leaves, frozen = config.partition.leaves, config.partition.frozen
    shardings = leaf_shardings(leaves, config.mesh)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in leaves.items()
        if path in frozen
    }


def abstract_batch(rows: int, length: int, mesh: Mesh) -> Batch:
    """Return a batch's shapes, dtypes and shardings."""
    sharding = rows_sharding(mesh)
    ids: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding)
    weights: Any = jax.ShapeDtypeStruct((rows, length), jnp.float32, sharding=sharding)
    return Batch(ids, ids, weights, ids, ids)


def state_bytes(config: StepConfig, rows: int, length: int) -> dict[str, int]:
    """Bytes that a device is given for a step, by what they are for."""
    leaves = config.partition.leaves
    shardings = leaf_shardings(leaves, config.mesh)
    state = abstract_state(config)
    counters = (state.step, state.rng, state.loss_scale)
    frozen = {p: _held(leaves[p], shardings[p]) for p in config.partition.frozen}
    quantized = sum(size for path, size in frozen.items() if leaves[path].quantized)
    return {
        **({"quantized weights": quantized} if quantized else {}),
        "frozen weights": sum(frozen.values()) - quantized,
        "trainable weights": _held_by_all(state.trainable),
        "optimizer": _held_by_all((state.opt_state, counters)),
        "batch": _held_by_all(abstract_batch(rows, length, config.mesh)),
    }


def _held(leaf: Any, sharding: Any) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _held_by_all(tree: Any) -> int:
    return sum(_held(leaf, leaf.sharding) for leaf in jax.tree.leaves(tree))
