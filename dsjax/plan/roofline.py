# SPDX-License-Identifier: Apache-2.0
"""How long a step takes at least: the roofline of computing, memory and links.

In: what a step computes, reads and sends. Out: three times, and what follows if they overlap.
Assumed: every unit runs at its published peak, and nothing waits; links are those inside a slice or
host, half of the published bandwidth each way. Real steps take longer. Not done here: counting
(`training.flops`, `distributed.compiled`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsjax.distributed.compiled import Collective
from dsjax.distributed.devices import DEVICES, peak_flops

_TIMES_SENT = {"all-reduce": 2}
"""A collective's kind -> how often a device sends its larger side; once, where none is named."""


@dataclass(frozen=True)
class Estimate:
    """A step's times in seconds, at least; its speed, at most.

    Attributes:
        compute_seconds: matrix products, those computed again included.
        memory_seconds: reading weights, as often as they are computed with, and the state.
        link_seconds: collectives.
        step_seconds: the largest of the three.
        tokens_per_second: over all devices, every token counted.
        mfu: FLOPs that the gradients need, over the peak.
    """

    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    step_seconds: float
    tokens_per_second: float
    mfu: float


def estimate(
    device_kind: str,
    dtype: str,
    needed_flops: float,
    executed_flops: float,
    memory_traffic: float,
    collectives: Sequence[Collective],
    tokens: int,
) -> Estimate | None:
    """Compute the roofline of one step; None where a device's figures are not known.

    Args:
        device_kind: `jax.Device.device_kind`.
        dtype: the compute dtype's name.
        needed_flops: of one device.
        executed_flops: of one device.
        memory_traffic: bytes that one device moves to and from its memory.
        collectives: of one device.
        tokens: of the whole batch.
    """
    device, peak = DEVICES.get(device_kind), peak_flops(device_kind, dtype)
    if device is None or peak is None:
        return None
    sent = sum(c.bytes * _TIMES_SENT.get(c.kind, 1) for c in collectives)
    times = (
        executed_flops / peak,
        memory_traffic / device.memory_bandwidth,
        sent / (device.link_bandwidth / 2),
    )
    step = max(times)
    return Estimate(*times, step, tokens / step, needed_flops / (step * peak))
