# SPDX-License-Identifier: Apache-2.0
"""Objectives: what is optimised, each one record in one registry.

In: the model with its arrays, a `Batch`, and how the forward pass runs. Out: named sums, and which
of them are terms of the loss and metrics; the step divides each term once, over all microbatches
and devices, so that accumulation, packing and data parallelism are exact. A new objective is one
file, one entry here, and its keys in the `objective` section. Not done here: gradients, division.
"""

from collections.abc import Mapping

from dsjax.config import ObjectiveSection
from dsjax.distributed.sharding import Leaf
from dsjax.objectives.objective import Objective
from dsjax.objectives.sft import SFT

OBJECTIVES = {"sft": SFT}
"""objective.type -> its record."""


def objective_of(options: ObjectiveSection) -> Objective:
    """Return the record of a section's objective."""
    return OBJECTIVES[options.type]


def unused_keys(options: ObjectiveSection, leaves: Mapping[str, Leaf]) -> list[str]:
    """Keys that are set and change nothing: other objectives', and its own on this model."""
    objective, default = objective_of(options), ObjectiveSection(type=options.type)
    foreign = [
        f"objective.{key}"
        for key in ObjectiveSection.model_fields
        if key not in ("type", *objective.keys) and getattr(options, key) != getattr(default, key)
    ]
    return foreign + objective.unused_keys(options, leaves)
