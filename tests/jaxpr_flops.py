# SPDX-License-Identifier: Apache-2.0
"""Counts the matrix products of a traced program: scans by their length, dead ones left out.

In: a run and a batch of tests/tiny_steps.py. Out: FLOPs of the step that `dsjax.training.step`
makes for them. Unlike XLA's own count it multiplies a scanned body by the scan's length; unlike
`dsjax.training.flops` it knows nothing of models and policies. Not here: products inside of
kernels.
"""

import math
from typing import Any

import tiny_steps
from jax.interpreters import partial_eval

from dsjax.data import Batch
from dsjax.training.step import make_train_step


def step_flops(run: tiny_steps.Run, batch: Batch) -> int:
    """FLOPs of the matrix products of one step, as they are handed to the compiler."""
    traced = make_train_step(run.config, run.state).trace(run.state, run.frozen, batch)
    whole = traced.jaxpr.jaxpr
    # Such as the gradients of frozen experts' weights, which nothing reads.
    live, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars), instantiate=True)
    return _count(live)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval
            total += 2 * math.prod(left[axis] for axis in contracted) * out.size
        elif name == "ragged_dot_general":  # every row with one matrix, or one more row of each
            (rows, _), other = (v.aval.shape for v in equation.invars[:2])
            width = math.prod(other[1:]) if len(other) == 3 else other[1]
            total += 2 * rows * width * (1 if len(other) == 3 else equation.invars[0].aval.shape[1])
        elif name == "cond":  # a choice by platform, TPU first
            total += _count(params["branches"][0].jaxpr)
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(_count(inner) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The programs among an operation's parameters."""
    programs = [getattr(value, "jaxpr", value) for value in params.values()]
    return [program for program in programs if hasattr(program, "eqns")]
