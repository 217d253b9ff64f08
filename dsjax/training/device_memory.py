# SPDX-License-Identifier: Apache-2.0
"""Memory of the devices, as their own allocators count it.

In: devices of this process. Out: what was used, what there is. Not done here: what a program will
need (`compiled`, `plan`), and the devices of other processes, which only those can ask.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

GIB = 2**30


@runtime_checkable
class CountsMemory(Protocol):
    """A `jax.Device`, as far as it is asked here."""

    def memory_stats(self) -> Mapping[str, int] | None:
        """Return what its allocator counts, in bytes; None if it counts nothing."""
        ...


def peak_memory_gib(devices: Iterable[CountsMemory]) -> float | None:
    """Return the most memory in use at once since the start, on the device where that is the most.

    Args:
        devices: those of this process.

    Returns:
        GiB; None where no device counts, as no CPU does.
    """
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [held["peak_bytes_in_use"] for held in stats if "peak_bytes_in_use" in held]
    return max(peaks) / GIB if peaks else None


def memory_limit(devices: Iterable[CountsMemory]) -> int | None:
    """Return the bytes that a program can have on the device that has least.

    Args:
        devices: those of this process.

    Returns:
        None where no device counts, as no CPU does.
    """
    stats = [device.memory_stats() or {} for device in devices]
    return min((held["bytes_limit"] for held in stats if "bytes_limit" in held), default=None)
