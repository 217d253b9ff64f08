# SPDX-License-Identifier: Apache-2.0
"""What is said before a run takes long."""

import pytest

from dsjax.training.announcement import large_on_cpu


@pytest.mark.parametrize(
    ("parameters", "platform", "told"),
    [
        (7_615_616_512, "cpu", "WARNING: 7.6 billion parameters on a CPU, where a step takes"),
        (7_615_616_512, "gpu", ""),
        (999_999_999, "cpu", ""),
    ],
)
def test_a_large_model_on_a_cpu_is_warned_of(parameters: int, platform: str, told: str):
    lines = large_on_cpu(parameters, platform)
    assert len(lines) == bool(told) and all(line.startswith(told) for line in lines)
