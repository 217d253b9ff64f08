# SPDX-License-Identifier: Apache-2.0
"""An objective, as one record: all that the rest of the package knows of it.

In: nothing. Out: `Objective`, which an objective's file fills in, and which `OBJECTIVES` registers.
Step, meter, log, bar and evaluation read the names that a record gives and know none, but for two
that every objective has: the metric `loss`, and `tokens`, the sum by which speed is measured. Not
done here: any objective, gradients, division.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from dsjax.config import ObjectiveSection
from dsjax.data import Batch
from dsjax.distributed.sharding import Layout, Leaf
from dsjax.models import Model
from dsjax.models.slots import Dropout
from dsjax.weights.safetensors import TensorInfo

Sums = dict[str, jax.Array]
"""Sums over some rows by name; those of all microbatches and devices are added up."""

TOKENS = "tokens"
"""The sum of real tokens, trained or not, padding excluded."""


class Forward(NamedTuple):
    """How a forward pass runs.

    Attributes:
        remat: `training.gradient_checkpointing`.
        dropout: of adapters; None where nothing is dropped.
        layout: of the mesh, None on one device.
        row_shards: number of parts that the rows are dealt into.
    """

    remat: str = "none"
    dropout: Dropout | None = None
    layout: Layout | None = None
    row_shards: int = 1


class Term(NamedTuple):
    """One term of what is minimised: weight * sum / divisor, both over the whole batch.

    Attributes:
        divisor: of a batch. It depends on the rows alone, so that the whole batch's is known before
            the first microbatch; where it is 0 the sum is 0 as well.
        weight: of the term.
    """

    divisor: Callable[[Batch], jax.Array]
    weight: float = 1.0


class Metric(NamedTuple):
    """A number that is logged: a sum over another, each added up over steps or over batches.

    Attributes:
        sum: name of the sum.
        count: name of the sum that divides it; None: the sum itself is shown.
        shown: how the terminal shows it; empty: it does not.
        optional: whether only some runs have it. Such a metric is written last, and its sums are
            not kept over the whole run.
        value: what is made of the mean.
    """

    sum: str
    count: str | None
    shown: str = ""
    optional: bool = False
    value: Callable[[float], float] = float

    def names(self) -> tuple[str, ...]:
        """Return the names of the sums that it needs."""
        return (self.sum,) if self.count is None else (self.sum, self.count)

    def of(self, sums: Mapping[str, Any]) -> Any:
        """Its value by sums as plain numbers; None where there is nothing to divide by."""
        if self.count is None:
            return sums[self.sum]
        return self.value(sums[self.sum] / sums[self.count]) if sums[self.count] else None


class Gauge(NamedTuple):
    """A number of a single training step, that of a logged line; evaluation has none.

    Attributes:
        sum: the sum that it reads; steps without have no such number.
        value: (all sums of the step, the model) -> the number.
        shown: as in `Metric`.
    """

    sum: str
    value: Callable[[Mapping[str, Any], Model], float | int]
    shown: str = ""


def _nothing(options: ObjectiveSection, *_: Any) -> list[str]:
    return []


def _unchanged(options: ObjectiveSection) -> ObjectiveSection:
    return options


def _no_addition(options: ObjectiveSection, model: Model) -> None:
    return None


def _never(options: ObjectiveSection) -> bool:
    return False


def _moves_nothing(options: ObjectiveSection, path: str, value: jax.Array, sums: Sums) -> jax.Array:
    raise AssertionError(f"{path} has no gradient, and nothing else that moves it")


@dataclass(frozen=True)
class Objective:
    """What is optimised, and what is told of it.

    Attributes:
        keys: the keys of the `objective` section that it uses.
        batch_fields: the fields of a `Batch` that it reads.
        sums: the sums over some rows; traced. `loss` is the sum of the metric of that name.
        terms: the terms that the options switch on, by the names of their sums. A sum that a model
            does not have (no experts, no balance loss) is no term of it.
        metrics: of training, in the order in which they are written; `loss` is among them.
        eval_metrics: of an evaluation; `loss` is among them, and written first.
        gauges: what single steps tell besides.
        for_evaluation: the options without what is of use in training only.
        prepare: puts what the options need besides into the abstract model.
        problems: (options, model, kind of adapter) -> why they cannot have these options.
        tensor_problems: (options, model, the checkpoint's tensors) -> the same of the tensors.
        unused_keys: (options, the model's leaves) -> own keys that change nothing of this model.
        moves_biases: whether routers' biases, which have no gradient, move after each step.
        moved: (options, path, value, the step's sums) -> the new value of such a bias; traced.
    """

    keys: tuple[str, ...]
    batch_fields: tuple[str, ...]
    sums: Callable[[Model, Batch, Forward, ObjectiveSection], Sums]
    terms: Callable[[ObjectiveSection], dict[str, Term]]
    metrics: Mapping[str, Metric]
    eval_metrics: Mapping[str, Metric]
    gauges: Mapping[str, Gauge] = field(default_factory=dict)
    for_evaluation: Callable[[ObjectiveSection], ObjectiveSection] = _unchanged
    prepare: Callable[[ObjectiveSection, Model], None] = _no_addition
    problems: Callable[[ObjectiveSection, Model, str | None], list[str]] = _nothing
    tensor_problems: Callable[[ObjectiveSection, Model, Mapping[str, TensorInfo]], list[str]] = (
        _nothing
    )
    unused_keys: Callable[[ObjectiveSection, Mapping[str, Leaf]], list[str]] = _nothing
    moves_biases: Callable[[ObjectiveSection], bool] = _never
    moved: Callable[[ObjectiveSection, str, jax.Array, Sums], jax.Array] = _moves_nothing
