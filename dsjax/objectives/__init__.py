# SPDX-License-Identifier: Apache-2.0
"""Objectives: pure functions from a model and a batch to sums.

In: the model with its arrays, a `Batch`, and how the forward pass runs. Out: (loss sum, metrics
sums); the step divides by the batch's weight once, over all microbatches and devices, so that
accumulation, packing and data parallelism are exact. Not done here: gradients, division.
"""

from dsjax.objectives.sft import sft

OBJECTIVES = {"sft": sft}
"""objective.type -> function."""
