# SPDX-License-Identifier: Apache-2.0
"""A plan is of the remat policy that the run would take on those devices."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest
import small_run

from dsjax.config import RunConfig, load_config
from dsjax.plan import plan as planning
from dsjax.plan.topologies import Topology, open_topology

KEEPS = {"none": 8, "dots": 6, "names": 3, "full": 1}
"""Remat policy -> memory of a step that was made up."""


def test_a_plan_is_of_the_policy_that_the_run_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(jax.devices()) == 8  # before a topology asks for fewer, which the process then keeps
    topology = open_topology("cpu:1")
    config = load_config(small_run.write_inputs(tmp_path, "lora"))
    real = planning.make_plan(config, topology)
    assert real.fits and real.gradient_checkpointing == "none"

    for room, chosen in ((8, "none"), (7, "dots"), (3, "names"), (0, "full")):

        def planned(config: RunConfig, topology: Topology, room: int = room) -> planning.Plan:
            policy = config.training.gradient_checkpointing
            left = None if policy == "none" and not room else room - KEEPS[policy]
            return replace(real, gradient_checkpointing=policy, headroom_bytes=left)

        monkeypatch.setattr(planning, "_make_plan", planned)
        assert planning.make_plan(config, topology).gradient_checkpointing == chosen
