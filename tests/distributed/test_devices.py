# SPDX-License-Identifier: Apache-2.0
"""The table of accelerators."""

import pytest

from dsjax.distributed.devices import DEVICES, peak_flops


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "float16", None),
        ("NVIDIA H100 80GB HBM3", "float16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks(kind, dtype, peak):
    assert peak_flops(kind, dtype) == peak


@pytest.mark.parametrize(("name", "marketed"), [("TPU v5p", 95), ("NVIDIA H200", 141)])
def test_memory_is_near_what_is_on_the_box(name, marketed):
    assert DEVICES[name].memory_bytes == pytest.approx(marketed * 2**30, rel=0.02)


@pytest.mark.parametrize("name", DEVICES)
def test_figures_are_in_bytes_and_flops_per_second(name):
    device = DEVICES[name]
    assert 15 * 2**30 < device.memory_bytes < 200 * 2**30
    # A bfloat16 product wants some hundred FLOPs per byte of memory, and links are slower.
    assert 100 < device.peak_flops / device.memory_bandwidth < 600
    assert 64e9 <= device.link_bandwidth < device.memory_bandwidth
