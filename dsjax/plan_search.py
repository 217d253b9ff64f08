# SPDX-License-Identifier: Apache-2.0
"""Plans of many variants: the batch and remat policy that suit a slice, the slices that suit a run.

In: a configuration, and what may vary. Out: what was tried, with the choice marked. Each variant is
compiled, which takes a while: callers are told before each. Not done here: one plan (`planning`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsjax.config import MeshSection, RunConfig
from dsjax.errors import ConfigError
from dsjax.planning import Plan, make_plan
from dsjax.sharding import batch_shards, make_mesh
from dsjax.topologies import SLICES, Topology, open_topology

POLICIES = ("none", "dots", "names", "full")
"""Remat policies, from what computes least again to what keeps least."""

MOST_ROWS = 64
"""Rows on a device that a search goes up to."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """One variant that a search tried."""

    batch_size: int
    gradient_checkpointing: str
    fits: bool
    peak_bytes_per_device: int | None
    tokens_per_second: float | None
    chosen: bool = False


@dataclass(frozen=True)
class Suggestion:
    """One slice with one mesh, and whether the run fits."""

    topology: str
    devices: int
    overrides: tuple[str, ...]
    fits: bool
    peak_bytes_per_device: int | None
    hbm_bytes_per_device: int


def search(config: RunConfig, topology: Topology, say: Say) -> list[Found]:
    """Find the largest batch that fits in one portion, and the cheapest policy for it.

    The batch doubles under `full`, which keeps least, until it does not fit; for the largest that
    did, the policies are tried from the cheapest on.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    tried: list[Found] = []

    def attempt(rows: int, policy: str) -> bool:
        batch = rows * batch_shards(mesh)
        say(f"compiling batch_size {batch}, remat {policy}")
        plan = make_plan(_with(config, batch, policy), topology)
        speed = None if plan.time is None else plan.time.tokens_per_second
        tried.append(Found(batch, policy, plan.fits, plan.peak_bytes_per_device, speed))
        return plan.fits

    rows = 1
    while rows <= MOST_ROWS and attempt(rows, "full"):
        rows *= 2
    largest = rows // 2
    if not largest:
        return tried
    for policy in POLICIES[:-1]:
        if attempt(largest, policy):
            break
    chosen = next(
        f for f in reversed(tried) if f.fits and f.batch_size == largest * batch_shards(mesh)
    )
    return [replace(f, chosen=f is chosen) for f in tried]


def _with(config: RunConfig, batch_size: int, policy: str) -> RunConfig:
    training = config.training.model_copy(
        update={
            "batch_size": batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": policy,
        }
    )
    return config.model_copy(update={"training": training})


def suggest(config: RunConfig, accelerator: str | None, say: Say) -> list[Suggestion]:
    """Try slices from the smallest on, until one fits.

    Args:
        config: the run's; its mesh, batch size and accumulation are replaced, so that a device has
            one row at a time.
        accelerator: v5p, h100 ...; None for v5e, v6e and v5p.
        say: told before each compilation.
    """
    kinds = _kinds(accelerator)
    found: list[Suggestion] = []
    for kind in kinds:
        for slice_ in SLICES[kind]:
            topology = open_topology(f"{kind}:{slice_}")
            tried = list(_on(config, topology, say))
            found += tried
            if any(s.fits for s in tried):
                break
    return found


def _kinds(accelerator: str | None) -> Sequence[str]:
    if accelerator is None:
        return ("v5e", "v6e", "v5p")
    kind = accelerator.partition(":")[0]
    if kind not in SLICES:
        raise ConfigError(
            f"--topology: got {accelerator}, expected with --suggest one of {', '.join(SLICES)}"
        )
    return (kind,)


def _on(config: RunConfig, topology: Topology, say: Say) -> Iterator[Suggestion]:
    """The meshes for one slice until one fits."""
    for mesh in meshes(config, topology):
        devices = len(topology.devices)
        rows = math.prod(size for axis, size in mesh.items() if axis != "tensor")
        batch = max(rows, config.training.batch_size // rows * rows)
        section = MeshSection(fsdp=mesh["fsdp"], expert=mesh["expert"])
        variant = _with(config, batch, config.training.gradient_checkpointing)
        training = variant.training.model_copy(
            update={"gradient_accumulation_steps": batch // rows}
        )
        variant = variant.model_copy(update={"training": training, "mesh": section})
        words = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
        say(f"compiling {topology.name} {' '.join(words)}")
        plan = make_plan(variant, topology)
        words += [
            f"training.batch_size={batch}",
            f"training.gradient_accumulation_steps={batch // rows}",
        ]
        yield _suggestion(plan, devices, words)
        if plan.fits:
            return


def _suggestion(plan: Plan, devices: int, words: list[str]) -> Suggestion:
    return Suggestion(
        plan.topology,
        devices,
        tuple(words),
        plan.fits,
        plan.peak_bytes_per_device,
        plan.hbm_bytes_per_device,
    )


def meshes(config: RunConfig, topology: Topology) -> list[dict[str, int]]:
    """Meshes for a number of devices: the asked-for expert axis where it divides, then fsdp."""
    devices = len(topology.devices)
    expert = config.mesh.expert if config.mesh.expert > 0 else 1
    experts = math.gcd(expert, devices)
    found: list[dict[str, Any]] = [{"fsdp": devices // experts, "expert": experts}]
    if experts > 1:
        found.append({"fsdp": devices, "expert": 1})
    return found
