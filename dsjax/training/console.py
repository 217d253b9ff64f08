# SPDX-License-Identifier: Apache-2.0
"""What a run prints: the start banner, the table of what trains, the progress bar.

In: facts and values that the run has already computed. Out: text on stderr, and nothing on stdout.
Where stderr is no terminal, the text has no control characters and the bar becomes plain lines.
Not done here: files (`metrics_log`) and deciding which process prints (callers pass `primary`).
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from dsjax.config.stage_clock import StageClock, clock
from dsjax.objectives.objective import Objective

# What trains of one module kind: path, shape, dtype, trainable parameters, all parameters.
TrainableRow = tuple[str, str, str, int, int]

_OF_STEP = {
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad norm {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "step_time": "{:,.3f} s/step",
    "device_memory_gib": "{:.1f} GiB",
}
_OF_RUN = {
    "loss_scale": "loss scale {:g}",
    "skipped_steps": "skipped {:,}",
    "untrained_steps": "untrained {:,}",
}
_UNTRAINED = (
    "{:,} of the steps so far had a batch without one trained token: nothing is added to the loss, "
    "and the optimizer steps with a gradient of 0; later lines count them as `untrained`"
)
_IN_THE_BAR = ("loss", "tokens_per_second", "mfu")


class Progress:
    """A bar on a terminal, plain lines elsewhere; a context manager."""

    def __init__(
        self,
        objective: Objective,
        total_steps: int,
        start_step: int = 0,
        primary: bool = True,
    ) -> None:
        self._forms = _forms(objective)
        self._total, self._start, self._primary = total_steps, start_step, primary
        self._began = time.monotonic()
        self._untrained_told = False
        self._bar = None
        self._first_step = StageClock("the first step", at_once=False)
        console = _console()
        if primary and console.is_terminal and not console.is_dumb_terminal:
            self._bar = _bar(console)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, shown="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        elif self._primary:
            self._first_step.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._first_step.stop()

    def advance(self, step: int) -> None:
        """Move the bar to a finished step; call it at every step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        self._first_step.stop()

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Show a training line, above the bar on a terminal: the losses so far stay to be seen."""
        untrained = values.get("untrained_steps")
        if untrained and not self._untrained_told:
            self._untrained_told = True
            self._line(step, _UNTRAINED.format(untrained))
        if self._bar is not None:
            shown = {key: values.get(key) for key in _IN_THE_BAR}
            self._bar.update(self._task, completed=step, shown=self._shown(shown))
            self._line(step, self._shown(values))
        else:
            self._line(step, f"{self._shown(values)} | ETA {self._eta(step)}")

    def log_eval(self, step: int, values: Mapping[str, object]) -> None:
        """Show an evaluation as a line of its own, above the bar on a terminal."""
        self._line(step, self._shown(values))

    @contextmanager
    def evaluating(self, batches: int) -> Iterator[Callable[[int], None]]:
        """Show how far an evaluation is: as a second bar, else in lines if it takes long.

        Yields:
            A function that is told how many of its batches are done.
        """
        if self._bar is not None:
            bar = self._bar
            task = bar.add_task("", total=batches, shown="batches of the evaluation")
            try:
                yield lambda done: bar.update(task, completed=done)
            finally:
                bar.remove_task(task)
        elif self._primary:
            with StageClock("evaluating", at_once=False) as lines:
                yield lambda done: lines.tell(f"batch {done:,} of {batches:,}")
        else:
            yield lambda done: None

    def _line(self, step: int, text: str) -> None:
        # While a bar is up, rich stands in for sys.stderr and puts the line above it.
        if self._primary:
            print(f"step {step}/{self._total} | {text}", file=sys.stderr, flush=True)

    def _shown(self, values: Mapping[str, object]) -> str:
        given = [(form, values.get(key)) for key, form in self._forms.items()]
        return " | ".join(form.format(value) for form, value in given if value is not None)

    def _eta(self, step: int) -> str:
        done = max(step - self._start, 1)
        return clock((time.monotonic() - self._began) / done * max(self._total - step, 0))


@contextmanager
def exporting(primary: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Say, with a clock, how far an export is.

    Yields:
        A function that is told the bytes written so far and in all; what follows the last of them
        is the proof.
    """
    with working("exporting", primary) as far:
        yield lambda done, total: far(
            f"{_amount(done, total)} written" if done < total else "written; proving it"
        )


class Loading:
    """Shows how much of a checkpoint has been read or written: `loading(done, total)` in bytes."""

    def __init__(self, verb: str = "reading weights", primary: bool = True) -> None:
        self._verb, self._primary = verb, primary
        self._began, self._said = time.monotonic(), 0.0

    def __call__(self, done: int, total: int) -> None:
        """Say how far it is: in place on a terminal, else a line now and then and at the end."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        pause = 0.2 if terminal else 2 if now - self._began < 10 else 10
        early = done < total and now - self._said < pause
        if early or not self._primary:
            return
        self._said = now
        rate = done / max(now - self._began, 1e-9) / 2**20
        text = f"{self._verb}: {_amount(done, total)}, {rate:,.0f} MiB/s"
        end = "\r" if terminal and done < total else "\n"
        print(text, end=end, file=sys.stderr, flush=True)


@contextmanager
def working(
    text: str, primary: bool = True, at_once: bool = True
) -> Iterator[Callable[[str], None]]:
    """Say what is done until the block ends, with a clock: in place on a terminal, else in lines.

    Args:
        text: what is done.
        primary: whether this process says it.
        at_once: whether the first line comes at the start, or only where it takes longer.

    Yields:
        A function that is told how far it is, in a few words.
    """
    console = _console()
    if not primary:
        yield lambda far: None
    elif console.is_terminal and not console.is_dumb_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with RichProgress(
            *columns, console=console, transient=True, redirect_stdout=False
        ) as shown:
            task = shown.add_task(text)
            yield lambda far: shown.update(task, description=f"{text}: {far}")
    else:
        with StageClock(text, at_once) as lines:
            yield lines.tell


def _amount(done: int, total: int) -> str:
    unit, name = (2**30, "GiB") if total >= 2**30 else (2**20, "MiB")
    return f"{done / unit:.2f} of {total / unit:.2f} {name}"


def _forms(objective: Objective) -> dict[str, str]:
    """How values are shown, in the order in which they are: the objective's between the others."""
    evaluated = {f"eval_{name}": metric for name, metric in objective.eval_metrics.items()}
    forms = {
        "epoch": "epoch {:.2f}",
        **{name: metric.shown for name, metric in objective.metrics.items()},
        **_OF_STEP,
        **{name: gauge.shown for name, gauge in objective.gauges.items()},
        **_OF_RUN,
        **{name: metric.shown for name, metric in evaluated.items()},
    }
    return {name: form for name, form in forms.items() if form}


def _bar(console: Console) -> RichProgress:
    return RichProgress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
        speed_estimate_period=600,  # rich's 30 s would leave slow steps without an ETA
        redirect_stdout=False,  # what a command prints on stdout must stay there
    )


def _console() -> Console:
    """Return a console on stderr that takes texts literally: `[q_proj]` is no markup here."""
    terminal = sys.stderr.isatty()
    return Console(
        file=sys.stderr,
        force_terminal=terminal,
        width=None if terminal else 100,
        markup=False,
        highlight=False,
        emoji=False,
    )


def banner(facts: Mapping[str, object], title: str = "dsjax") -> None:
    """Print the facts of a run, a name and a value a row; integers get thousands separators."""
    console = _console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, f"{value:,}" if type(value) is int else str(value))
    frame = box.ROUNDED if console.is_terminal else box.ASCII
    console.print(Panel(grid, title=title, title_align="left", box=frame, expand=False))


def trainable_line(trainable: int, all_parameters: int) -> str:
    """Return PEFT's line; `all_parameters` counts the adapter's as well."""
    percent = 100 * trainable / all_parameters
    return (
        f"trainable params: {trainable:,d} || all params: {all_parameters:,d} || "
        f"trainable%: {percent:.4f}"
    )


def trainable_table(rows: Sequence[TrainableRow], all_parameters: int) -> str:
    """Print what trains, a row per module kind, with PEFT's line below; return the same text."""
    cells = [("module", "shape", "dtype", "trainable")]
    cells += [(path, shape, dtype, _part(some, whole)) for path, shape, dtype, some, whole in rows]
    path, shape, dtype, part = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        f"{cell[0]:<{path}}  {cell[1]:<{shape}}  {cell[2]:<{dtype}}  {cell[3]:>{part}}"
        for cell in cells
    ]
    lines.append(trainable_line(sum(row[3] for row in rows), all_parameters))
    text = "\n".join(lines)
    print(text, file=sys.stderr)
    return text


def _part(some: int, whole: int) -> str:
    return f"{some:,}" if some == whole else f"{some:,} of {whole:,}"
