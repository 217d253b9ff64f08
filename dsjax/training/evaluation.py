# SPDX-License-Identifier: Apache-2.0
"""The loss of a model over a whole data set, exact to the token.

In: the parts of a step, arrays, and a loader. Out: the objective's metrics of an evaluation, such
as the token-weighted mean loss and its perplexity. A batch is computed in microbatches, as
that of a step is. Not done here: loading the model or the data.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsjax.data import Batch, Loader
from dsjax.distributed.mesh import batch_shards, microbatches, replicated, rows_sharding
from dsjax.distributed.sharding import Params, leaf_shardings, make_layout
from dsjax.objectives.objective import Forward, Objective, Sums
from dsjax.training.state import StepConfig, abstract_batch, abstract_frozen, abstract_state


class StoppedError(Exception):
    """An evaluation was given up because its caller asked for it."""


def to_devices(batch: Batch, mesh: Mesh, loader: Loader | None = None) -> Batch:
    """Put this process's rows of a batch onto its devices.

    Args:
        batch: the rows.
        mesh: the devices.
        loader: where the batch is from; it knows which rows these are. Not needed for devices
            that are all this process's.
    """
    sharding = rows_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    assert loader is not None, "several processes: whose rows are these?"
    rows, total = np.asarray(loader.rows), loader.batch_size

    def put(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(total)
            first = int(np.searchsorted(rows, start))
            return x[first : first + stop - start]

        return jax.make_array_from_callback((total, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def make_eval_step(config: StepConfig) -> Any:
    """Make the jitted sums of a batch, `(trainable, frozen, batch) -> Sums`, without dropout.

    Where a device has fewer rows than there are microbatches, there are fewer of them: as many as
    divide both.
    """
    leaves, mesh = config.partition.leaves, config.mesh
    shardings = leaf_shardings(leaves, mesh)
    split = [
        {path: shardings[path] for path in paths}
        for paths in (config.partition.trainable, config.partition.frozen)
    ]
    forward = Forward("none", None, make_layout(mesh), batch_shards(mesh))
    options = config.objective.for_evaluation(config.options)

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> Sums:
        def sums(rows: Batch) -> Sums:
            model = config.partition.merge(trainable, frozen)
            return config.objective.sums(model, rows, forward, options)

        count = math.gcd(config.accumulation, len(batch.input_ids) // batch_shards(mesh))
        if count == 1:
            return sums(batch)
        pieces = jax.tree.map(lambda x: microbatches(x, count, mesh), batch)
        shapes = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], pieces))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(total: Sums, rows: Batch) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, sums(rows)), None

        return jax.lax.scan(add, zeros, pieces)[0]

    return jax.jit(
        eval_step,
        in_shardings=(*split, rows_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def lower_eval_step(config: StepConfig, rows: int, length: int) -> jax.stages.Lowered:
    """Lower the evaluation step on abstract arrays, as `lower_train_step` does it."""
    trainable, frozen = abstract_state(config).trainable, abstract_frozen(config)
    batch = abstract_batch(rows, length, config.mesh)
    return make_eval_step(config).lower(trainable, frozen, batch)


def evaluate_loss(
    objective: Objective,
    eval_step: Callable[[Params, Params, Batch], Sums],
    trainable: Params,
    frozen: Params,
    loader: Loader,
    mesh: Mesh,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float | int]:
    """Evaluate one pass over the loader's data.

    Args:
        objective: whose sums they are.
        eval_step: from `make_eval_step`.
        trainable: the trained arrays.
        frozen: all other arrays.
        loader: the data.
        mesh: the devices.
        stop: asked after each batch whether to give up.
        progress: told after each batch how many are done.

    Returns:
        The objective's metrics of an evaluation, each under its name with `eval_` before it; a mean
        over nothing is NaN.

    Raises:
        StoppedError: `stop()` said so.
    """
    metrics = objective.eval_metrics
    totals = {name: 0 for metric in metrics.values() for name in metric.names()}
    for done, batch in enumerate(loader.iterate(0, loader.steps_in_epoch(0)), 1):
        sums = jax.device_get(eval_step(trainable, frozen, to_devices(batch, mesh, loader)))
        if stop():
            raise StoppedError
        totals = {name: total + sums[name].item() for name, total in totals.items()}
        progress(done)
    values = {f"eval_{name}": metric.of(totals) for name, metric in metrics.items()}
    return {name: math.nan if value is None else value for name, value in values.items()}
