# SPDX-License-Identifier: Apache-2.0
"""Plans of many variants: the batch and remat policy that suit a slice, the slices that suit a run.

In: a configuration, and what may vary. Out: what was tried, with the choice marked. Each variant is
compiled, which takes a while: callers are told before each. Not done here: one plan (`plan`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsjax.config import MeshSection, RunConfig
from dsjax.distributed.mesh import batch_shards, make_mesh
from dsjax.errors import ConfigError
from dsjax.models.decoder import POLICIES
from dsjax.plan.plan import make_plan, prepare, with_policy
from dsjax.plan.topologies import SLICES, Topology, open_topology
from dsjax.training.setup import assemble
from dsjax.training.state import policies_of, state_bytes

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
    """One slice with one mesh, and whether the run fits.

    Attributes:
        topology: the slice's name.
        devices: their number.
        overrides: words that ask for the mesh and the batch.
        gradient_checkpointing: the remat policy; full for a run under auto, since it fits if any
            does.
        fits: whether a device's memory holds the step.
        compiled: False where what a device is given is too much already.
        given_bytes_per_device: weights, optimizer and batch.
        peak_bytes_per_device: None if it was not compiled, or the compiler gave up.
        hbm_bytes_per_device: what a program can have.
        notes: what there is to say besides.
    """

    topology: str
    devices: int
    overrides: tuple[str, ...]
    gradient_checkpointing: str
    fits: bool
    compiled: bool
    given_bytes_per_device: int
    peak_bytes_per_device: int | None
    hbm_bytes_per_device: int
    notes: tuple[str, ...]


def search(config: RunConfig, topology: Topology, say: Say) -> list[Found]:
    """Find the largest batch that fits in one microbatch, and the cheapest policy for it.

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
    batch = {"batch_size": batch_size, "gradient_accumulation_steps": 1}
    training = config.training.model_copy(update=batch)
    return with_policy(config.model_copy(update={"training": training}), policy)


def suggest(config: RunConfig, accelerator: str | None, say: Say) -> list[Suggestion]:
    """Try slices from the smallest on, until one fits.

    Args:
        config: the run's; a device gets one row at a time. Of its mesh the tensor and expert axes
            are kept where they divide the devices; copies (`data`) become shards, which need less.
        accelerator: v5p, h100 ...; None for v5e, v6e and v5p.
        say: told before each compilation.

    Raises:
        ConfigError: there is no such accelerator, its compiler is not here, the run is refused.
    """
    kinds = _kinds(accelerator)
    limits = _limits(config, open_topology(f"{kinds[0]}:{SLICES[kinds[0]][0]}"))
    found: list[Suggestion] = []
    for kind in kinds:
        for slice_ in SLICES[kind]:
            tried = list(_on(config, open_topology(f"{kind}:{slice_}"), limits, say))
            found += tried
            if any(s.fits for s in tried):
                break
    return found


def _kinds(accelerator: str | None) -> Sequence[str]:
    if accelerator is None:
        return ("v5e", "v6e", "v5p")
    if accelerator not in SLICES:
        kind = accelerator.partition(":")[0]
        hint = f"; did you mean {kind}?" if kind in SLICES else ""
        known = ", ".join(SLICES)
        raise ConfigError(
            f"--topology: got {accelerator or 'nothing'}, expected with --suggest, which finds the "
            f"shape, one of {known}{hint}"
        )
    return (accelerator,)


def _limits(config: RunConfig, topology: Topology) -> dict[str, int]:
    """Return what the expert and tensor axes have to divide; 0 for anything."""
    lone = config.model_copy(update={"mesh": MeshSection()})
    leaves = assemble(lone, topology.devices[:1], weights=False).partition.leaves.values()
    sizes: dict[str, list[int]] = {"experts": [], "mlp": []}
    for leaf in leaves:
        if leaf.kind == "base" and "experts" in leaf.axes:
            for axis, size in zip(leaf.axes, leaf.shape, strict=True):
                sizes.get(axis or "", []).append(size)
    return {"expert": math.gcd(*sizes["experts"]) or 1, "tensor": math.gcd(*sizes["mlp"])}


def _on(
    config: RunConfig, topology: Topology, limits: Mapping[str, int], say: Say
) -> Iterator[Suggestion]:
    """Try meshes for one slice until one fits; what cannot fit is not compiled."""
    for mesh in meshes(config.mesh, len(topology.devices), limits):
        variant, words = _variant(config, mesh)
        batch, room = variant.training.batch_size, topology.memory_bytes
        shown = f"{topology.name} {' '.join(words)}"
        asked = config.training.batch_size
        notes = [] if batch == asked else [f"batch_size was {asked}: the mesh has to divide it"]
        *_, remat = policies_of(config.training)  # the last fits if any does
        given = sum(
            state_bytes(prepare(variant, topology)[1], batch, config.data.max_length).values()
        )
        fits, peak = False, None
        if given > room:
            notes.append(
                f"not compiled: weights, optimizer and batch take {given / 2**30:,.2f} GiB"
            )
            say(f"skipping {shown}: {notes[-1]}")
        else:
            say(f"compiling {shown}")
            if variant.training.gradient_checkpointing != remat:
                notes.append(f"under remat {remat}")
            plan = make_plan(with_policy(variant, remat), topology)
            fits, peak = plan.fits, plan.peak_bytes_per_device
            notes += ["the compiler gave up"] if peak is None else []
        yield Suggestion(
            topology=topology.name,
            devices=len(topology.devices),
            overrides=tuple(words),
            gradient_checkpointing=remat,
            fits=fits,
            compiled=given <= room,
            given_bytes_per_device=given,
            peak_bytes_per_device=peak,
            hbm_bytes_per_device=room,
            notes=tuple(notes),
        )
        if fits:
            return


def _variant(config: RunConfig, mesh: MeshSection) -> tuple[RunConfig, list[str]]:
    """Return the run on a mesh, a row at a time on each device; and the words that ask for it."""
    rows = mesh.data * mesh.fsdp * mesh.expert
    batch = max(rows, config.training.batch_size // rows * rows)
    changes = {"batch_size": batch, "gradient_accumulation_steps": batch // rows}
    training = config.training.model_copy(update=changes)
    words = [
        f"mesh.{axis}={size}"
        for axis, size in mesh.model_dump().items()
        if axis == "fsdp" or size != getattr(config.mesh, axis)
    ]
    words += [f"training.{key}={value}" for key, value in changes.items()]
    return config.model_copy(update={"training": training, "mesh": mesh}), words


def meshes(asked: MeshSection, devices: int, limits: Mapping[str, int]) -> list[MeshSection]:
    """Meshes for a number of devices: as asked where that divides, then with other expert axes.

    Args:
        asked: the run's.
        devices: their number.
        limits: what the expert and tensor axes have to divide; 0 for anything.
    """
    tensor = math.gcd(devices, _asked(asked.tensor, devices), limits["tensor"])
    left = devices // tensor
    most = math.gcd(left, limits["expert"])
    kept = math.gcd(most, _asked(asked.expert, left))
    # A quarter of it: fewer tokens of others to hold, for more of the experts to gather.
    experts = dict.fromkeys((kept, most, max(most // 4, 1), 1))
    return [MeshSection(fsdp=left // e, expert=e, tensor=tensor) for e in experts if most % e == 0]


def _asked(size: int, devices: int) -> int:
    return devices if size == -1 else size
