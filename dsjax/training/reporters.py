# SPDX-License-Identifier: Apache-2.0
"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio, SwanLab.

In: scalars and texts by step. Out: TensorBoard's event file, or a run of a tracker, written by the
tracker's own library; that library also finds its login, server and project in its own environment
variables. Not done here: which lines there are (`metrics_log`).

A reporter is one class and one entry of REPORTERS. The trackers are not dependencies of dsjax: each
is imported only where `logging.report_to` names it, and what is not installed is refused before
anything is read. A tracker that fails later, as a network does, ends no run.
"""

import html
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from dsjax.config import LoggingSection
from dsjax.errors import ConfigError, files_of, first_line, raise_all
from dsjax.training.run_dir import RunDir
from dsjax.weights.folders import write_atomic

PROJECT = "dsjax"
"""Of a tracker's runs, where the library's own settings name no other."""

ID_LENGTH = 21
"""Characters of a run's id, lower-case letters and digits: all that SwanLab takes."""


@dataclass(frozen=True)
class ReportedRun:
    """What a reporter is told of a run.

    Attributes:
        directory: its files.
        resume_step: the optimizer step that this start goes on from.
        config: its resolved configuration, by section.
    """

    directory: RunDir
    resume_step: int
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return what it is called: as its output directory is."""
        return self.directory.path.absolute().name

    @cached_property
    def id(self) -> str:
        """Return what all starts of the run share, kept in its output directory."""
        file = self.directory.tracker_id
        with files_of(file):
            if self.resume_step and file.is_file():
                return file.read_text("utf-8").strip()
        made = uuid.uuid4().hex[:ID_LENGTH]
        write_atomic(file, f"{made}\n")
        return made


@runtime_checkable
class Reporter(Protocol):
    """Takes a run's numbers and texts."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the curves."""
        ...

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Add a text."""
        ...

    def close(self, failed: bool) -> None:
        """Send what is left, and end; nothing can be added afterwards."""
        ...


class Wandb:
    """A run of Weights & Biases; its own files lie in `wandb/` of the output directory."""

    def __init__(self, run: ReportedRun) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=wandb.setup().settings.project or PROJECT,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.directory.path),
            config=dict(run.config),
        )
        # wandb drops what comes with a step below the last one. A resumed run begins below what a
        # killed one had sent, so steps are a value of their own, and the axis of all others.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the curves."""
        self._run.log({**values, "step": step})

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Add a text; wandb shows HTML."""
        page = self._wandb.Html(f"<pre>{html.escape(markdown)}</pre>")
        self._run.log({tag: page, "step": step})

    def close(self, failed: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio; its files lie where TRACKIO_DIR says."""

    def __init__(self, run: ReportedRun) -> None:
        import trackio

        self._trackio: Any = trackio
        # It knows a run by its name alone.
        self._run: Any = trackio.init(
            project=PROJECT,
            name=f"{run.name}-{run.id[:8]}",
            config=dict(run.config),
            resume="allow",
            embed=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the curves."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Add a text."""
        self._run.log({tag: self._trackio.Markdown(markdown)}, step=step)

    def close(self, failed: bool) -> None:
        """Write what is left; Trackio does not show how a run ended."""
        del failed
        self._run.finish()


class SwanLab:
    """A run of SwanLab; its own files lie in `swanlog/` of the output directory."""

    def __init__(self, run: ReportedRun) -> None:
        import swanlab

        self._swanlab: Any = swanlab
        swanlab.init(
            project=swanlab.Settings().project.name or PROJECT,
            name=run.name,
            id=run.id,
            resume="allow",
            log_dir=str(run.directory.path / "swanlog"),
            config=dict(run.config),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the curves."""
        self._swanlab.log(dict(values), step=step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Add a text."""
        self._swanlab.log({tag: self._swanlab.Text(markdown)}, step=step)

    def close(self, failed: bool) -> None:
        """Send what is left."""
        how = {"state": "crashed", "error": "see the run's console"} if failed else {}
        self._swanlab.finish(**how)


class Tolerant:
    """A tracker whose failures end no run: the first is told, all are counted.

    Args:
        name: of the tracker.
        reporter: what may fail.
    """

    def __init__(self, name: str, reporter: Reporter) -> None:
        self._name, self._reporter, self._failures = name, reporter, 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the curves."""
        self._attempt(f"step {step}", lambda: self._reporter.scalars(step, values))

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Add a text."""
        self._attempt(f"{tag} of step {step}", lambda: self._reporter.text(step, tag, markdown))

    def close(self, failed: bool) -> None:
        """End, and say how much was lost."""
        self._attempt("the end", lambda: self._reporter.close(failed))
        if self._failures > 1:
            print(f"{self._name}: {self._failures} reports failed in all", file=sys.stderr)

    def _attempt(self, what: str, report: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # the libraries greet on stdout
                report()
        except Exception as error:  # each library, and its HTTP library, has its own
            self._failures += 1
            if self._failures == 1:
                print(
                    f"{self._name}: {what} is not reported ({first_line(error)}); the run goes "
                    "on, and metrics.jsonl has all; further failures are counted",
                    file=sys.stderr,
                )


def _open_tensorboard(run: ReportedRun) -> Reporter:
    # Imported here: a run that does not report would pay for it as well.
    from dsjax.training.event_file import EventFile

    return EventFile(run.directory.tensorboard, run.resume_step)


REPORTERS: Mapping[str, Callable[[ReportedRun], Reporter]] = MappingProxyType(
    {"tensorboard": _open_tensorboard, "wandb": Wandb, "trackio": Trackio, "swanlab": SwanLab}
)
"""`logging.report_to` -> what opens it; each has the name of its package."""

LOCAL = ("tensorboard",)
"""Those that write to the output directory: what fails there is the disk, and ends the run."""


def check_reporters(section: LoggingSection, primary: bool) -> None:
    """Refuse a reporter whose library is not installed.

    Args:
        section: the config's `logging` section.
        primary: whether this is the process that reports; the others need no library.

    Raises:
        ConfigError: one line for each.
    """
    names = section.report_to if primary else ()
    raise_all(
        f"logging.report_to: got {name}, which is not installed, expected one of the installed: "
        f"pip install {name}"
        for name in dict.fromkeys(names)
        if find_spec(name) is None
    )


def open_reporters(section: LoggingSection, run: ReportedRun) -> list[Reporter]:
    """Open all that are asked for.

    Raises:
        ConfigError: a tracker cannot begin: no login, no network.
    """
    return [_open(name, run) for name in dict.fromkeys(section.report_to)]


def _open(name: str, run: ReportedRun) -> Reporter:
    if name in LOCAL:
        return REPORTERS[name](run)
    try:
        with redirect_stdout(sys.stderr):
            return Tolerant(name, REPORTERS[name](run))
    except Exception as error:
        raise ConfigError(
            f"logging.report_to: got {name}, which did not begin a run ({first_line(error)}), "
            f"expected one that does; log in, or take {name} out"
        ) from error
