# SPDX-License-Identifier: Apache-2.0
"""A run's plan: its step, compiled for devices that need not be there, and what that says.

In: a `RunConfig` and a `Topology`. Out: a `Plan`. The stages are those of training, on abstract
arrays. Not done here: printing (`report`), trying variants (`search`).
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import jax

from dsjax.config import RunConfig
from dsjax.distributed.compiled import (
    Collective,
    Collectives,
    Memory,
    collectives_of,
    memory_of,
    too_large,
)
from dsjax.distributed.mesh import batch_shards, check_batch, check_length
from dsjax.distributed.sharding import (
    computed_sharding,
    has_experts,
    leaf_sharding,
    replication_report,
)
from dsjax.models import Model
from dsjax.models.moe import tokens_at_once
from dsjax.plan.roofline import Estimate, estimate
from dsjax.plan.topologies import Topology
from dsjax.training.evaluation import lower_eval_step
from dsjax.training.flops import token_flops
from dsjax.training.setup import Assembly, assemble
from dsjax.training.state import StepConfig, policies_of, state_bytes, step_config
from dsjax.training.step import lower_train_step

ANY_LENGTH = 1000
"""Optimizer steps of the planned run: its schedule's length changes nothing else."""


@dataclass(frozen=True)
class ArrayPlan:
    """One array of the model: what a device holds of it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    trainable: bool
    bytes_per_device: int


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        fits: whether a device's memory holds the step, and the evaluation if there is one.
        topology: the devices' name.
        platform: tpu, cuda or cpu.
        device_kind: jax's name of them.
        devices: their number.
        mesh: size of every axis.
        batch_size: rows of a step.
        gradient_accumulation_steps: microbatches that they are computed in.
        max_length: tokens of a row.
        gradient_checkpointing: the remat policy.
        peak_bytes_per_device: the most that is needed at a time; None if the compiler gave up.
        hbm_bytes_per_device: what a program can have.
        headroom_bytes: the difference; None as above.
        evaluation_bytes_per_device: the most that an evaluation needs at a time, with the optimizer
            state that waits beside it; None without an evaluation, or if the compiler gave up.
        classes: bytes per device by what they are for; `temporaries` among them.
        compiler_says: its words, where it refused a program for want of memory.
        total_params: of the model with its adapter.
        trainable_params: those that train.
        flops_per_step: that the loss and its gradients need, over all devices.
        executed_flops_per_step: including what rematerialisation computes again.
        collectives: of one step, on one device.
        unknown_loops: loops with collectives that are counted once, for want of their length.
        time: the estimate; None for a device whose figures are not known.
        replicated: what mesh axes do not divide, a line each.
        arrays: every array of the model.
        compile_seconds: what compiling took here.
    """

    fits: bool
    topology: str
    platform: str
    device_kind: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    gradient_checkpointing: str
    peak_bytes_per_device: int | None
    hbm_bytes_per_device: int
    headroom_bytes: int | None
    evaluation_bytes_per_device: int | None
    classes: dict[str, int]
    compiler_says: str | None
    total_params: int
    trainable_params: int
    flops_per_step: float
    executed_flops_per_step: float
    collectives: list[Collective]
    unknown_loops: int
    time: Estimate | None
    replicated: list[str]
    arrays: list[ArrayPlan]
    compile_seconds: float


def make_plan(config: RunConfig, topology: Topology) -> Plan:
    """Compile a run's step for a topology, under the remat policy that the run would take there.

    Raises:
        ConfigError: the configuration cannot run on these devices.
    """
    *policies, last = policies_of(config.training)
    for policy in policies:
        plan = _make_plan(with_policy(config, policy), topology)
        if plan.headroom_bytes is not None and plan.headroom_bytes >= 0:  # an evaluation has none
            return plan
    return _make_plan(with_policy(config, last), topology)


def with_policy(config: RunConfig, policy: str) -> RunConfig:
    """Return the run under a remat policy."""
    training = config.training.model_copy(update={"gradient_checkpointing": policy})
    return config.model_copy(update={"training": training})


def _make_plan(config: RunConfig, topology: Topology) -> Plan:
    training, length = config.training, config.data.max_length
    setup, step = prepare(config, topology)
    began = time.monotonic()
    batch = (training.batch_size, length)
    memory, collectives, refusal = _compile(lower_train_step(step, *batch), topology)
    evaluated = None
    if (config.data.eval or config.data.val_size) and memory is not None:
        evaluated, _, refusal = _compile(lower_eval_step(step, *batch), topology)
    seconds, remat = time.monotonic() - began, training.gradient_checkpointing
    chunks = _experts_in_chunks(setup.model, step, training.batch_size, length)
    flops = token_flops(setup.model, setup.partition, length, remat, chunks)
    tokens = training.batch_size * length
    trainable, total = setup.partition.counts()
    classes = state_bytes(step, training.batch_size, length)
    if memory is not None:
        classes["temporaries"] = memory.peak - memory.arguments
    needed, room = None if memory is None else memory.peak, topology.memory_bytes
    evaluation = None if evaluated is None else evaluated.peak + classes["optimizer"]
    return Plan(
        fits=refusal is None and max(needed or 0, evaluation or 0) <= room,
        topology=topology.name,
        platform=topology.platform,
        device_kind=topology.kind,
        devices=len(topology.devices),
        mesh=dict(setup.mesh.shape),
        batch_size=training.batch_size,
        gradient_accumulation_steps=step.accumulation,
        max_length=length,
        gradient_checkpointing=remat,
        peak_bytes_per_device=needed,
        hbm_bytes_per_device=room,
        headroom_bytes=None if needed is None else room - needed,
        evaluation_bytes_per_device=evaluation,
        classes=classes,
        compiler_says=refusal,
        total_params=total,
        trainable_params=trainable,
        flops_per_step=flops.needed * tokens,
        executed_flops_per_step=flops.executed * tokens,
        collectives=collectives.by_kind,
        unknown_loops=collectives.unknown_loops,
        time=estimate(
            topology.kind,
            config.model.dtype,
            flops.needed * tokens / len(topology.devices),
            flops.executed * tokens / len(topology.devices),
            _traffic(step, classes, remat),
            collectives.by_kind,
            tokens,
        ),
        replicated=replication_report(setup.partition.leaves, setup.mesh),
        arrays=array_plans(step),
        compile_seconds=seconds,
    )


def prepare(config: RunConfig, topology: Topology) -> tuple[Assembly, StepConfig]:
    """Assemble a run and its step on a topology; nothing is compiled.

    Raises:
        ConfigError: the configuration cannot run on these devices.
    """
    setup = assemble(config, topology.devices, weights=False)
    step = step_config(config, setup.partition, setup.mesh, ANY_LENGTH)
    check_batch(config.training.batch_size, step.accumulation, setup.mesh)
    check_length(config.data.max_length, setup.mesh)
    return setup, step


def _experts_in_chunks(model: Model, step: StepConfig, rows: int, length: int) -> bool:
    """Whether a row's tokens go through the experts in several chunks."""
    if not has_experts(step.partition.leaves):
        return False
    held = rows // step.accumulation // batch_shards(step.mesh) * step.mesh.shape["expert"]
    c = model.config
    chosen, size = c.router.num_experts_per_tok, model.dtype.itemsize
    part = length // step.mesh.shape["sequence"]
    return tokens_at_once(held, chosen, c.hidden_size, size) < part


def _compile(
    lowered: jax.stages.Lowered, topology: Topology
) -> tuple[Memory | None, Collectives, str | None]:
    """Compile; return memory, collectives, or what the compiler says of too little memory."""
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options or None)
    except jax.errors.JaxRuntimeError as error:
        return None, Collectives([], 0), too_large(error)
    return memory_of(compiled, topology.platform), collectives_of(compiled.as_text() or ""), None


def array_plans(step: StepConfig) -> list[ArrayPlan]:
    """Where every array of the model lies."""
    plans = []
    for path, leaf in step.partition.leaves.items():
        sharding = leaf_sharding(leaf, step.mesh)
        held = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        trains = path in step.partition.trainable and path not in step.partition.kept
        spec = ", ".join(_spec_entry(entry) for entry in sharding.spec)
        plans.append(ArrayPlan(path, leaf.shape, leaf.dtype.name, spec, trains, held))
    return plans


def _spec_entry(entry: Any) -> str:
    if entry is None:
        return "-"
    return entry if isinstance(entry, str) else " x ".join(entry)


def _traffic(step: StepConfig, classes: dict[str, int], remat: str) -> float:
    """Bytes that a device's memory moves at least in a step.

    Each microbatch reads the gathered weights once forward, once backward, and once more
    where blocks are computed again; the update reads and writes what trains and its moments.
    """
    passes = 2 + (remat != "none")
    gathered = sum(
        math.prod(computed_sharding(leaf, step.mesh).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in step.partition.leaves.values()
    )
    updated = 2 * (classes["trainable weights"] + classes["optimizer"])
    return float(step.accumulation * passes * gathered + updated)
