# SPDX-License-Identifier: Apache-2.0
"""The programs of a run, compiled before there is anything to hold.

In: a `StepConfig` and the shape of the batches. Out: compiled programs, and what they took and
take; of the step, the remat policy under which it fits. Not done here: the step itself (`step`).
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax

from dsjax.data import Loader
from dsjax.distributed.compiled import memory_of, too_large
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.training.console import working
from dsjax.training.device_memory import memory_limit
from dsjax.training.evaluation import lower_eval_step
from dsjax.training.state import StepConfig, state_bytes
from dsjax.training.step import lower_train_step

_WORST_FIRST = (False, None, True)
"""Values of `Attempt.fits`."""


class Attempt(NamedTuple):
    """A program, or why there is none.

    Attributes:
        program: None if the compiler refused it for want of memory; then `fits` is False.
        needs: how much memory, in words.
        fits: whether the devices of all hosts have it; None if that is not known.
    """

    program: Any
    needs: str
    fits: bool | None


def compile_step(
    step: StepConfig, policies: Sequence[str], loader: Loader, hosts: Hosts
) -> tuple[Any, str]:
    """Compile the step ahead of the loop, so that its time and memory are seen as what they are.

    Args:
        step: its parts.
        policies: for remat, to try in this order until a step fits.
        loader: its batches.
        hosts: who compile it.

    Returns:
        The program, and the policy.

    Raises:
        ConfigError: it fits under none.
    """
    rows, length = loader.batch_size, loader.sequence_length
    *_, last = policies
    for policy in policies:
        lower = partial(lower_train_step, replace(step, remat=policy), rows, length)
        tried = _attempt(lower, "the step", f" with remat {policy}", 0, hosts)
        # What does not say what it needs is taken only where nothing could need less.
        if tried.fits or (tried.fits is None and policy == last):
            return tried.program, policy
    raise ConfigError(
        f"training.batch_size: got {rows} rows of {length} tokens in {step.accumulation} "
        f"microbatches, whose step with remat {last} needs {tried.needs}, expected it to fit; "
        "raise training.gradient_accumulation_steps, lower training.batch_size or data.max_length, "
        "or take more devices, as dsjax plan --suggest names them"
    )


def compile_evaluation(step: StepConfig, loader: Loader, hosts: Hosts) -> Any:
    """Compile the evaluation ahead as well: what it lacks shows before hours of training.

    Raises:
        ConfigError: it does not fit.
    """
    rows, length = loader.batch_size, loader.sequence_length
    beside = state_bytes(step, rows, length)["optimizer"]
    lower = partial(lower_eval_step, step, rows, length)
    tried = _attempt(lower, "the evaluation", "", beside, hosts)
    if tried.fits is False:
        raise ConfigError(
            f"data.eval: got rows of {length} tokens, whose evaluation needs {tried.needs}, "
            "expected it to fit; lower training.batch_size or data.max_length"
        )
    return tried.program


def _attempt(lower: Callable[[], Any], name: str, how: str, beside: int, hosts: Hosts) -> Attempt:
    """Compile for the devices that are here, and say what it took and takes.

    Args:
        lower: gives the program; to trace a large model takes seconds too.
        name: what it is.
        how: what else to say of it.
        beside: bytes of a device that are in use besides.
        hosts: who compile it.
    """
    began = time.monotonic()
    with working(f"compiling {name}{how}", hosts.primary):
        tried = _compile(lower, beside)
        # One answer for all, the worst: where it does not fit one of them, none goes on with it.
        answers = map(json.loads, hosts.all_gather_text(json.dumps([tried.fits, tried.needs])))
        fits, needs = min(answers, key=lambda answer: _WORST_FIRST.index(answer[0]))
    took = f"compiled {name} in {time.monotonic() - began:.1f} s{how}"
    hosts.log_once(f"{took}; it needs {needs}")
    return Attempt(tried.program, needs, fits)


def _compile(lower: Callable[[], Any], beside: int) -> Attempt:
    try:
        program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return Attempt(None, f"too much: {too_large(error)}", False)
    try:
        peak = beside + memory_of(program, jax.devices()[0].platform).peak
    except jax.errors.JaxRuntimeError:  # read from jax's cache, which need not keep its plan
        return Attempt(program, "what a program from the cache does not say", None)
    limit = memory_limit(jax.local_devices())
    needs = f"{peak / 2**30:.2f} GiB per device"
    if limit is None or peak <= limit:
        return Attempt(program, needs, True)
    return Attempt(program, f"{needs} of {limit / 2**30:.2f}", False)
