# SPDX-License-Identifier: Apache-2.0
"""The train step: a pure function over raw pytrees in one `jax.jit`.

In: the state (trainable arrays, optimizer state, counters), the frozen arrays and a batch. Out: the
new state and the step's sums. Gradients exist for the learnt part only, are float32, and each term
of the loss is divided once, by its divisor over the whole batch; what has no gradient and trains
all the same, routers' biases, is moved by the objective. Names of terms and sums are its own.
Not done here: loading, logging, saving, evaluating (`evaluation`).
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsjax.data import Batch
from dsjax.distributed.mesh import batch_shards, microbatches, replicated, rows_sharding
from dsjax.distributed.sharding import Params, leaf_shardings, make_layout
from dsjax.models.slots import Dropout
from dsjax.objectives.objective import Forward, Sums
from dsjax.training.loss_scale import next_loss_scale
from dsjax.training.optimizer import clip_by_global_norm
from dsjax.training.partition import Partition
from dsjax.training.rounding import round_to, share_lost
from dsjax.training.state import (
    StepConfig,
    StepReport,
    TrainState,
    abstract_batch,
    abstract_frozen,
    abstract_state,
    gradient_params_f32,
    state_shardings,
)


def make_train_step(
    config: StepConfig, state: Any
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, StepReport]]:
    """Make the jitted step; the state is donated.

    Args:
        config: the parts.
        state: a `TrainState`, concrete or abstract, for its tree.
    """
    shardings = state_shardings(state, config)
    frozen = {
        path: sharding
        for path, sharding in leaf_shardings(config.partition.leaves, config.mesh).items()
        if path in config.partition.frozen
    }

    def train_step(state: TrainState, frozen: Params, batch: Batch):
        grads, sums = _accumulate(config, state, frozen, batch)
        grads = jax.tree.map(lambda g: g / state.loss_scale.scale, grads)
        norm = optax.tree.norm(grads)
        updated, learning_rate, lost = _update(config, state, grads, norm, sums)
        new_state = _keep_or_skip(config, state, updated, norm)
        if config.float16:  # the sums of a skipped step are not finite; the skip is counted
            sums = jax.tree.map(lambda s: jnp.where(jnp.isfinite(norm), s, 0).astype(s.dtype), sums)
        report = StepReport(
            sums,
            norm,
            learning_rate,
            state.loss_scale.scale,
            new_state.loss_scale.skipped,
            lost,
        )
        return new_state, report

    return jax.jit(
        train_step,
        in_shardings=(shardings, frozen, rows_sharding(config.mesh)),
        out_shardings=(shardings, replicated(config.mesh)),
        donate_argnums=0,
    )


def _accumulate(
    config: StepConfig, state: TrainState, frozen: Params, batch: Batch
) -> tuple[Params, Sums]:
    """Gradients of the scaled terms together, and the sums, over all microbatches."""
    key, multipliers = _step_key(state), _multipliers(config, state, batch)
    params_f32 = gradient_params_f32(state.trainable, config.partition)
    others = [path for path in config.partition.trainable if path not in params_f32]
    constants = frozen | {path: state.trainable[path] for path in others}

    def micro(rows: Batch, token_BT: jax.Array | None) -> tuple[Params, Sums]:
        layout = make_layout(config.mesh)
        dropout = None
        if token_BT is not None:
            dropout = Dropout(key, jax.lax.with_sharding_constraint(token_BT, layout.rows))
        forward = Forward(config.remat, dropout, layout, batch_shards(config.mesh))

        def scaled_loss(params_f32: Params) -> tuple[jax.Array, Sums]:
            model = config.partition.merge(params_f32, constants)
            sums = config.objective.sums(model, rows, forward, config.options)
            scaled = [sums[name] * by for name, by in multipliers.items() if name in sums]
            return functools.reduce(jnp.add, scaled), sums

        (_, sums), grads = jax.value_and_grad(scaled_loss, has_aux=True)(params_f32)
        return _masked(grads, config.partition), sums

    shape = batch.input_ids.shape
    tokens = jnp.arange(math.prod(shape)).reshape(shape) if config.dropout else None
    if config.accumulation == 1:
        return micro(batch, tokens)
    pieces = jax.tree.map(
        lambda x: microbatches(x, config.accumulation, config.mesh), (batch, tokens)
    )

    def add(total, piece):
        return jax.tree.map(jnp.add, total, micro(*piece)), None

    shapes = jax.eval_shape(micro, *jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, pieces)
    return total


def _multipliers(config: StepConfig, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """Compute what each term's sum is multiplied by: its weight over the whole batch's divisor.

    A batch without a trained token has nothing to divide by, and no gradient either.
    """
    found = {}
    for name, term in config.objective.terms(config.options).items():
        divisor = term.divisor(batch)
        scaled = term.weight * state.loss_scale.scale
        found[name] = scaled / jnp.where(divisor > 0, divisor, 1)
    return found


def _step_key(state: TrainState) -> jax.Array:
    return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def _masked(grads: Params, partition: Partition) -> Params:
    """No gradient for the frozen layers of a stack that trains in part."""
    return {path: _where_trained(path, grad, 0, partition) for path, grad in grads.items()}


def _where_trained(
    path: str, value: jax.Array, otherwise: jax.Array | int, partition: Partition
) -> jax.Array:
    """`value` in the layers that train, `otherwise` in the frozen layers of the stack."""
    mask = partition.layer_masks.get(path)
    if mask is None:
        return value
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (value.ndim - mask.ndim)), value, otherwise)


def _update(
    config: StepConfig, state: TrainState, grads: Params, norm: jax.Array, sums: Sums
) -> tuple[tuple[Params, Any], jax.Array, jax.Array | None]:
    """Return new trainable arrays and optimizer state, learning rate, the share of lost updates."""
    params_f32 = gradient_params_f32(state.trainable, config.partition)
    clipped = clip_by_global_norm(grads, norm, config.max_grad_norm)
    updates: Any
    updates, opt_state = config.optimizer.update(clipped, state.opt_state, params_f32)
    old, key, updated = state.trainable, _step_key(state), {}
    for path in config.partition.gradient_params:
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        new = round_to(params_f32[path] + updates[path], old[path].dtype, own_key)
        # Frozen layers are copied: adding a zero to them would turn -0 into +0.
        updated[path] = _where_trained(path, new, old[path], config.partition)
    learning_rate = config.schedule(state.step - state.loss_scale.skipped)
    wanted = {p: _where_trained(p, updates[p], 0, config.partition) for p in updated}
    lost = share_lost(old, updated, wanted)
    updated |= {path: old[path] for path in config.partition.kept}
    return (updated | _moved_biases(config, old, sums), opt_state), learning_rate, lost


def _moved_biases(config: StepConfig, trainable: Params, sums: Sums) -> Params:
    """Routers' biases after a step."""
    moved = {}
    for path in config.partition.router_biases:
        new = config.objective.moved(config.options, path, trainable[path], sums)
        moved[path] = _where_trained(path, new, trainable[path], config.partition)
    return moved


def _keep_or_skip(
    config: StepConfig, state: TrainState, updated: tuple[Params, Any], norm: jax.Array
) -> TrainState:
    """Take the update; under float16, skip one whose gradients overflowed and halve the scale."""
    step = state.step + 1
    if not config.float16:
        return TrainState(*updated, step, state.rng, state.loss_scale)
    finite = jnp.isfinite(norm)
    old = (state.trainable, state.opt_state)
    trainable, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, old)
    loss_scale = next_loss_scale(state.loss_scale, finite)
    return TrainState(trainable, opt_state, step, state.rng, loss_scale)


def lower_train_step(config: StepConfig, rows: int, length: int) -> jax.stages.Lowered:
    """Lower the step on abstract arrays, ready to be compiled for the mesh's devices.

    Args:
        config: the parts.
        rows: B, of the whole batch.
        length: T.
    """
    state, frozen = abstract_state(config), abstract_frozen(config)
    batch = abstract_batch(rows, length, config.mesh)
    return make_train_step(config, state).lower(state, frozen, batch)
