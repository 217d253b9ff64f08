# SPDX-License-Identifier: Apache-2.0
"""Devices to compile for that are not there: TPU slices, GPU clusters, and simulated CPUs.

In: a name such as `v5p:2x4x4`, `h100:8x2` or `cpu:8`. Out: devices that a mesh can be made of, and
what their compiler is told. The compilers come with `jax[tpu]` and `jax[cuda13]`. Not done here:
compiling, what the devices can do (`distributed.devices`).
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jax
from jax.experimental import topologies

from dsjax.distributed.devices import DEVICES, GPU_MEMORY_SHARE
from dsjax.errors import ConfigError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")

SLICES: Mapping[str, tuple[str, ...]] = {
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": _CUBES,
    "v6e": _FLAT,
    **dict.fromkeys(
        ("a100", "a100-40gb", "h100", "h100-pcie", "h200", "l4", "l40s"), ("1", "2", "4", "8")
    ),
}
"""Accelerator -> the slices that are usually rented, smallest first; others are taken too. Of GPUs:
those of one host."""

_GPU_TARGETS = {
    "a100": "a100_sxm_80",
    "a100-40gb": "a100_sxm_40",
    "h100": "h100_sxm",
    "h100-pcie": "h100_pcie",
    "h200": "h200_sxm",
    "l4": "l4",
    "l40s": "l40s",
}
"""GPU -> its description in gpu_targets/, which XLA compiles for."""

_CORES_PER_CHIP = {"v4": 2, "v5p": 2}
"""What the N in Google's names of slices (v5p-8) counts, where it is not chips."""

_CHIPS_OF_A_POD = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256}
"""The most chips that links join (docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e})."""

_GPUS_OF_A_HOST = {"a100-40gb": 16}
"""The most GPUs that a host has, where it is not 8."""


@dataclass(frozen=True)
class Topology:
    """Devices that programs are compiled for.

    Attributes:
        name: as it was asked for.
        platform: tpu, cuda or cpu.
        devices: all of them.
        memory_bytes: what a program can have on one of them.
        compiler_options: for `compile`.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    memory_bytes: int
    compiler_options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`jax.Device.device_kind`."""
        return self.devices[0].device_kind


def open_topology(name: str) -> Topology:
    """Find the devices of a topology; call it before jax has looked for any.

    For GPUs the environment has to say JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1: compiling needs no
    driver, without which the plug-in refuses to be loaded.

    Args:
        name: `v5p:2x4x4` (chips along each side), `h100:8` (GPUs of one host), `h100:8x2` (of two),
            `cpu:8`.

    Raises:
        ConfigError: there is no such topology, or the compiler for it is not installed.
    """
    accelerator, _, shape = name.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError(_unknown(name))
    sides = [int(side) for side in shape.split("x")]
    if accelerator == "cpu" and len(sides) == 1:
        return _cpu(name, sides[0])
    if accelerator in _GPU_TARGETS and len(sides) <= 2:
        return _gpu(name, accelerator, sides[0], sides[1] if len(sides) == 2 else 1)
    if accelerator in SLICES and accelerator not in _GPU_TARGETS:
        return _tpu(name, accelerator, sides)
    raise ConfigError(_unknown(name))


def _unknown(name: str) -> str:
    """Return what to say of a name; of Google's names (v5p-8, v5litepod-16) what they are here."""
    told = re.fullmatch(r"(v\d\w*?)(?:litepod)?-(\d+)", name)
    if told:
        kind = told[1] + ("e" if "litepod" in name else "")
        meant = _slice_of(kind, int(told[2]) // _CORES_PER_CHIP.get(kind, 1))
        if meant:
            return f"--topology: got {name}, expected chips along each side; did you mean {meant}?"
    known = ", ".join(
        f"{kind}:{slices[min(2, len(slices) - 1)]}" for kind, slices in SLICES.items()
    )
    got = name or "nothing"
    return f"--topology: got {got}, expected ACCELERATOR:SHAPE, such as {known}, or cpu:8"


def _slice_of(kind: str, chips: int) -> str | None:
    """Return the usual slice of a number of chips."""
    slices = [s for s in SLICES.get(kind, ()) if math.prod(map(int, s.split("x"))) == chips]
    return f"{kind}:{slices[0]}" if slices else None


def _check_slice(name: str, accelerator: str, sides: list[int]) -> None:
    """Refuse what libtpu would take in silence: other sides than the network's, too many chips."""
    usual, chips = SLICES[accelerator], math.prod(sides)
    count, most = usual[0].count("x") + 1, _CHIPS_OF_A_POD[accelerator]
    if len(sides) != count:
        meant = _slice_of(accelerator, chips) or f"{accelerator}:{usual[-1]}"
        raise ConfigError(
            f"--topology: got {name}, expected chips along {count} sides; did you mean {meant}?"
        )
    if chips > most:
        raise ConfigError(
            f"--topology: got {name} ({chips} chips), expected at most the {most} of a pod; "
            f"{accelerator}:{usual[-1]} is the largest that is usual"
        )


def _cpu(name: str, count: int) -> Topology:
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # devices were looked for before: those have to do
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"--topology: got {name}, expected at most cpu:{len(devices)} here")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Topology(name, "cpu", tuple(devices[:count]), memory // count)


def _tpu(name: str, accelerator: str, sides: list[int]) -> Topology:
    _check_slice(name, accelerator, sides)
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {}
    if math.prod(sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if accelerator == "v4":
        options["chip_config_name"] = "megacore"  # else each half of a chip is a device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        known = ", ".join(f"{accelerator}:{shape}" for shape in SLICES[accelerator])
        reason = str(error).removeprefix("INVALID_ARGUMENT: ")
        raise ConfigError(f"--topology: got {name} ({reason}), expected one of {known}") from error
    except RuntimeError as error:  # jax's word for an absent libtpu
        raise ConfigError(_missing(name, "TPU", "tpu", error)) from error
    devices = tuple(found.devices)
    return Topology(name, "tpu", devices, DEVICES[devices[0].device_kind].memory_bytes)


def _gpu(name: str, accelerator: str, count: int, hosts: int) -> Topology:
    most = _GPUS_OF_A_HOST.get(accelerator, 8)
    if count > most:
        raise ConfigError(
            f"--topology: got {name}, expected at most {most} GPUs of a host; "
            f"{accelerator}:{most}x{math.ceil(count * hosts / most)} are those of several"
        )
    jax.config.update("jax_platforms", "cuda,cpu")
    file = resources.files("dsjax.plan") / "gpu_targets" / f"{_GPU_TARGETS[accelerator]}.txtpb"
    target = file.read_text()
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=target,
            topology=f"1x{hosts}x{count}",
        )
    except NotImplementedError as error:  # jax's word for an absent plug-in
        raise ConfigError(_missing(name, "CUDA", "cuda13", error)) from error
    memory = re.search(r"device_memory_size: (\d+)", target)
    assert memory is not None
    usable = int(int(memory[1]) * GPU_MEMORY_SHARE)
    # Without a GPU there is nothing to try kernels on.
    options = {"xla_gpu_autotune_level": 0}
    return Topology(name, "cuda", tuple(found.devices), usable, options)


def _missing(name: str, compiler: str, extra: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return (
        f"--topology: got {name}, but the {compiler} compiler cannot be used here ({reason}), "
        f"expected it; pip install 'jax[{extra}]'"
    )
