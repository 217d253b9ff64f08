# SPDX-License-Identifier: Apache-2.0
"""Plans as text.

In: plans. Out: lines for people to read. Not done here: making plans (`plan`, `search`).
"""

from collections.abc import Iterable, Sequence

from dsjax.plan.plan import Plan
from dsjax.plan.search import Found, Suggestion

_BAR = 40


def plan_lines(plan: Plan, verbose: bool) -> list[str]:
    """Write out a whole plan."""
    lines = [*_heading(plan), "", *_memory(plan), "", *_work(plan)]
    lines += ["", *plan.replicated] if plan.replicated else []
    return [*lines, "", *_arrays(plan)] if verbose else lines


def _heading(plan: Plan) -> list[str]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    count = plan.gradient_accumulation_steps
    return [
        f"{verdict(plan)} on {plan.topology}: {plan.devices} x {plan.device_kind}",
        f"mesh        {mesh or '1 device'}",
        f"batch       {plan.batch_size} rows of {plan.max_length:,} tokens, {count} "
        f"microbatch{'' if count == 1 else 'es'}, remat {plan.gradient_checkpointing}",
        f"parameters  {plan.total_params:,}, of which {plan.trainable_params:,} train",
        f"compiled    in {plan.compile_seconds:.0f} s",
    ]


def verdict(plan: Plan) -> str:
    """Whether it fits, in words."""
    return "fits" if plan.fits else "does not fit"


def _memory(plan: Plan) -> list[str]:
    room = plan.hbm_bytes_per_device
    lines = [f"memory of a device, of {gib(room)}:"]
    for name, size in plan.classes.items():
        bar = "#" * round(_BAR * min(size / room, 1))
        lines.append(f"  {name:<18}{gib(size):>12}  {bar}")
    if plan.peak_bytes_per_device is not None:
        lines.append(_peak("peak", plan.peak_bytes_per_device, room))
    if plan.evaluation_bytes_per_device is not None:
        lines.append(_peak("evaluation's peak", plan.evaluation_bytes_per_device, room))
    if plan.compiler_says is not None:
        lines.append(f"  the compiler gave up: {plan.compiler_says}")
    return lines


def _peak(name: str, size: int, room: int) -> str:
    left = room - size
    told = f"{gib(left)} left" if left >= 0 else f"{gib(-left)} too much"
    return f"  {name:<18}{gib(size):>12}  {told}"


def _work(plan: Plan) -> list[str]:
    lines = [
        f"a step needs {flops(plan.flops_per_step)}, and computes "
        f"{flops(plan.executed_flops_per_step)} including recomputation",
    ]
    for kind, count, size in plan.collectives:
        lines.append(f"  {kind:<20}{count:>8} times {gib(size):>12} on a device")
    if plan.unknown_loops:
        lines.append(f"  loops of unknown length, counted once: {plan.unknown_loops}")
    if plan.time is None:
        return [*lines, "no peak is known for this device in this dtype, so no time is estimated"]
    t = plan.time
    return [
        *lines,
        f"at least {t.step_seconds:.3f} s a step, if everything overlaps: computing "
        f"{t.compute_seconds:.3f} s, memory {t.memory_seconds:.3f} s, links {t.link_seconds:.3f} s",
        f"at most {t.tokens_per_second:,.0f} tokens/s, MFU {t.mfu:.1%}",
    ]


def _arrays(plan: Plan) -> list[str]:
    rows = [
        (
            array.path,
            " x ".join(map(str, array.shape)) or "1",
            array.dtype,
            array.spec or "-",
            "trains" if array.trainable else "",
            f"{array.bytes_per_device / 2**20:,.2f} MiB",
        )
        for array in plan.arrays
    ]
    return table([("array", "shape", "dtype", "divided by", "", "on a device"), *rows])


def search_lines(found: Sequence[Found]) -> list[str]:
    """Write what a search tried, the choice last."""
    rows = [
        (
            str(f.batch_size),
            f.gradient_checkpointing,
            "fits" if f.fits else "does not fit",
            "" if f.peak_bytes_per_device is None else gib(f.peak_bytes_per_device),
            "" if f.tokens_per_second is None else f"{f.tokens_per_second:,.0f}",
        )
        for f in found
    ]
    lines = table([("batch_size", "remat", "", "peak", "tokens/s at most"), *rows])
    chosen = next((f for f in found if f.chosen), None)
    if chosen is None:
        return [*lines, "", "nothing fits; more devices, or a shorter data.max_length, might"]
    return [
        *lines,
        "",
        f"training.batch_size={chosen.batch_size} training.gradient_accumulation_steps=1 "
        f"training.gradient_checkpointing={chosen.gradient_checkpointing}",
    ]


def suggestion_lines(found: Sequence[Suggestion]) -> list[str]:
    """Write the slices that were tried, smallest first, and of which accelerator none fits."""
    rows = [
        (
            s.topology,
            str(s.devices),
            " ".join(s.overrides),
            "fits" if s.fits else "does not fit",
            "" if s.peak_bytes_per_device is None else gib(s.peak_bytes_per_device),
            gib(s.hbm_bytes_per_device),
            "; ".join(s.notes),
        )
        for s in found
    ]
    lines = table([("topology", "devices", "overrides", "", "peak", "of", ""), *rows])
    largest = {s.topology.partition(":")[0]: s for s in found}
    ends = [
        f"nothing fits up to {s.topology}; a shorter data.max_length{_or_full(s)} might"
        for s in largest.values()
        if not s.fits
    ]
    return [*lines, "", *ends] if ends else lines


def _or_full(tried: Suggestion) -> str:
    """Advise the policy that keeps least, unless it is what was tried."""
    full = tried.gradient_checkpointing == "full"
    return "" if full else ", or training.gradient_checkpointing=full,"


def flops(count: float) -> str:
    """FLOPs in the largest unit that leaves a whole one."""
    for unit, size in (("PFLOPs", 1e15), ("TFLOPs", 1e12)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e9:,.1f} GFLOPs"


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:,.2f} GiB"


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns of text."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
