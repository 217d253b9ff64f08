# SPDX-License-Identifier: Apache-2.0
"""The programs of a run, compiled before there is anything to hold.

In: a `StepConfig` and the shape of the batches. Out: compiled programs, and what they took and
take. Not done here: the step itself (`step`).
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from dsjax.data import Loader
from dsjax.distributed.compiled import memory_of
from dsjax.distributed.processes import Hosts
from dsjax.training.console import working
from dsjax.training.evaluation import lower_eval_step
from dsjax.training.state import (
    StepConfig,
    state_bytes,
)
from dsjax.training.step import lower_train_step


def compile_step(step: StepConfig, loader: Loader, hosts: Hosts) -> Any:
    """Compile the step ahead of the loop, so that its time and memory are seen as what they are."""
    lower = partial(lower_train_step, step, loader.batch_size, loader.sequence_length)
    return _compiled(lower, "the step", 0, hosts)


def compile_evaluation(step: StepConfig, loader: Loader, hosts: Hosts) -> Any:
    """Compile the evaluation ahead as well: what it lacks shows before hours of training."""
    rows, length = loader.batch_size, loader.sequence_length
    beside = state_bytes(step, rows, length)["optimizer"]
    return _compiled(partial(lower_eval_step, step, rows, length), "the evaluation", beside, hosts)


def _compiled(lower: Callable[[], Any], name: str, beside: int, hosts: Hosts) -> Any:
    """Compile for the devices that are here, and say what it took and takes.

    Args:
        lower: gives the program; to trace a large model takes seconds too.
        name: what it is.
        beside: bytes of a device that are in use besides.
        hosts: who says it.
    """
    began = time.monotonic()
    with working(f"compiling {name}", hosts.primary):
        compiled = lower().compile()
    took = f"compiled {name} in {time.monotonic() - began:.1f} s"
    try:
        peak = beside + memory_of(compiled, jax.devices()[0].platform).peak
    except jax.errors.JaxRuntimeError:  # read from jax's cache, which need not keep its plan
        hosts.log_once(f"{took}; a program from the cache does not say how much memory it needs")
    else:
        hosts.log_once(f"{took}; it needs {peak / 2**30:.2f} GiB per device")
    return compiled
