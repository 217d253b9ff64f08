# SPDX-License-Identifier: Apache-2.0
"""The peak of the devices' memory: the largest that one counts, and none where none does."""

from dataclasses import dataclass

import jax

from dsjax.training.device_memory import memory_limit, peak_memory_gib


@dataclass(frozen=True)
class Accelerator:
    """What an accelerator that is not here says of its memory."""

    said: dict[str, int] | None

    def memory_stats(self) -> dict[str, int] | None:
        return self.said


def test_the_fullest_device_counts():
    said = [{"bytes_in_use": 2**30, "peak_bytes_in_use": gib * 2**30} for gib in (3, 5, 4)]
    assert peak_memory_gib(map(Accelerator, said)) == 5.0
    assert peak_memory_gib([Accelerator(None), Accelerator(said[0]), Accelerator({})]) == 3.0


def test_devices_that_do_not_count_have_no_peak():
    assert peak_memory_gib(jax.local_devices()) is None  # CPUs
    assert peak_memory_gib([Accelerator({"bytes_limit": 2**30})]) is None


def test_a_program_can_have_what_the_smallest_device_has():
    said = [{"bytes_limit": size} for size in (70, 60, 80)]
    assert memory_limit([*map(Accelerator, said), Accelerator({})]) == 60
    assert memory_limit([Accelerator(None)]) is None
