# SPDX-License-Identifier: Apache-2.0
"""Names of topologies, and what is said of those that are none."""

import re
from importlib import resources

import jax
import pytest

from dsjax.distributed.devices import DEVICES, GPU_MEMORY_SHARE
from dsjax.errors import ConfigError
from dsjax.plan import topologies
from dsjax.plan.topologies import open_topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p", "got v5p, expected ACCELERATOR:SHAPE, such as v4:2x2x4, .* or cpu:8"),
        ("v5p:2x", "got v5p:2x, expected ACCELERATOR:SHAPE"),
        ("v5p:0x2x2", "got v5p:0x2x2, expected ACCELERATOR:SHAPE"),
        ("tpu:8", "got tpu:8, expected ACCELERATOR:SHAPE"),
        ("h100:8x2x2", "got h100:8x2x2, expected ACCELERATOR:SHAPE"),
        ("v5p-8", "got v5p-8, expected chips along each side; did you mean v5p:2x2x1?"),
        ("v5litepod-16", "expected chips along each side; did you mean v5e:4x4?"),
        ("v5p:3x3x3", "got v5p:3x3x3 .*not divisible.*, expected one of v5p:2x2x1, v5p:2x2x2"),
        ("", "got nothing, expected ACCELERATOR:SHAPE"),
        ("v5p:2x2", "got v5p:2x2, expected chips along 3 sides; did you mean v5p:2x2x1?"),
        ("v5e:4x4x2", "got v5e:4x4x2, expected chips along 2 sides; did you mean v5e:4x8?"),
        ("v5e:3x5", "got v5e:3x5 .*not divisible.*, expected one of v5e:1x1, v5e:2x2"),
        ("v6e:32x16", "got v6e:32x16 .512 chips., expected at most the 256 of a pod"),
        ("h100:9", "got h100:9, expected at most 8 GPUs of a host; h100:8x2 are those of"),
        ("h100:0", "got h100:0, expected ACCELERATOR:SHAPE"),
        ("h100:8x", "got h100:8x, expected ACCELERATOR:SHAPE"),
        ("h100:8", "the CUDA compiler cannot be used here .*pip install 'jax\\[cuda13\\]'"),
        ("cpu:9", "got cpu:9, expected at most cpu:8 here"),
    ],
)
def test_a_name_that_is_no_topology_is_refused(name: str, message: str) -> None:
    assert len(jax.devices()) == 8  # found before, so that there are no more for cpu:9
    with pytest.raises(ConfigError, match=f"^--topology: .*{message}"):
        open_topology(name)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(**_: object) -> None:
        raise RuntimeError("no libtpu\nand more")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", absent)
    with pytest.raises(ConfigError, match=r"TPU compiler cannot be used here \(no libtpu\).*\[tpu"):
        open_topology("v5p:2x2x1")


def test_a_compiler_that_breaks_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise jax.errors.JaxRuntimeError("ABORTED: Internal error when accessing libtpu")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", broken)
    for name in ("v5p:2x2x1", "h100:8"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="ABORTED"):
            open_topology(name)


def test_simulated_devices() -> None:
    assert len(jax.devices()) == 8  # found before, so that cpu:4 leaves them for other tests
    topology = open_topology("cpu:4")
    assert topology.devices == tuple(jax.devices()[:4])
    assert (topology.platform, topology.kind) == ("cpu", "cpu")
    assert topology.memory_bytes > 0


def test_every_gpu_has_a_description_that_agrees_with_the_table_of_devices() -> None:
    for accelerator, file in topologies._GPU_TARGETS.items():
        text = (resources.files("dsjax.plan") / "gpu_targets" / f"{file}.txtpb").read_text()
        name = re.search(r'device_description_str: "(.*)"', text)
        memory = re.search(r"device_memory_size: (\d+)", text)
        assert name and memory and accelerator in topologies.SLICES
        assert DEVICES[name[1]].memory_bytes == pytest.approx(int(memory[1]), rel=0.01), file
    assert 0.5 < GPU_MEMORY_SHARE < 1
