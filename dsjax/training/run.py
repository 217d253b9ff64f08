# SPDX-License-Identifier: Apache-2.0
"""A run as it stands once its inputs are read and agreed on, and its programs.

In: what the first stages of `train` found. Out: one record each, which the later stages share. Not
done here: finding it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dsjax.config import RunConfig
from dsjax.distributed.processes import Hosts
from dsjax.objectives import objective_of
from dsjax.objectives.objective import Objective
from dsjax.training.run_data import Data
from dsjax.training.run_dir import RunDir
from dsjax.training.setup import Assembly


@dataclass(frozen=True)
class Run:
    """What a run is, before its first array.

    Attributes:
        config: by which its data was read.
        setup: its model, and what of it trains.
        data: its rows.
        total: its optimizer steps.
        started: when the first of its starts was.
        contents: digests of what it reads, by the keys that name it.
        hosts: this process among those of the run.
    """

    config: RunConfig
    setup: Assembly
    data: Data
    total: int
    started: str
    contents: Mapping[str, str]
    hosts: Hosts

    @property
    def directory(self) -> RunDir:
        """Where its results go."""
        return RunDir.of(self.config)

    @property
    def objective(self) -> Objective:
        """What it optimises."""
        return objective_of(self.config.objective)


class Programs(NamedTuple):
    """The compiled functions of a run; None for one that is not needed.

    Attributes:
        train_step: a step.
        eval_step: the same for evaluations.
        remat: the policy that the step was compiled with, in this start or in an earlier one.
    """

    train_step: Any
    eval_step: Any
    remat: str | None = None
