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
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
        return self.directory.name

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
        self._wandb: Any = import_module("wandb")
        self._run: Any = self._wandb.init(
            project=self._wandb.setup().settings.project or PROJECT,
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

    @staticmethod
    def login() -> None:
        """Log in where runs are sent at once; what is kept on disk needs no login."""
        wandb: Any = import_module("wandb")
        if wandb.setup().settings.mode not in ("offline", "disabled", "dryrun"):
            wandb.login()

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
        self._trackio: Any = import_module("trackio")
        # It knows a run by its name alone.
        self._run: Any = self._trackio.init(
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
        self._trackio.finish()


class SwanLab:
    """A run of SwanLab; its own files lie in `swanlog/` of the output directory."""

    def __init__(self, run: ReportedRun) -> None:
        self._swanlab: Any = import_module("swanlab")
        self._swanlab.init(
            project=self._swanlab.Settings().project.name or PROJECT,
            name=run.name,
            id=run.id,
            resume="allow",
            log_dir=str(run.directory.path / "swanlog"),
            config=dict(run.config),
        )

    @staticmethod
    def login() -> None:
        """Log in where runs are sent at once; what is kept on disk needs no login."""
        swanlab: Any = import_module("swanlab")
        if swanlab.Settings().mode == "online":
            swanlab.login()

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
            with redirect_stdout(sys.stderr):
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


def _nothing() -> None:
    """Ask for no login."""


class Kind(NamedTuple):
    """A kind of reporter.

    Attributes:
        open: begins to report a run.
        login: raises, as the library does, where it would not take a run.
        ends_run: whether a run ends where this fails: its files are the run's own, on its disk.
    """

    open: Callable[[ReportedRun], Reporter]
    login: Callable[[], None] = _nothing
    ends_run: bool = False


REPORTERS: Mapping[str, Kind] = MappingProxyType(
    {
        "tensorboard": Kind(_open_tensorboard, ends_run=True),
        "wandb": Kind(Wandb, Wandb.login),
        "trackio": Kind(Trackio),
        "swanlab": Kind(SwanLab, SwanLab.login),
    }
)
"""`logging.report_to`, which is also the name of the package -> what reports there."""


def check_reporters(section: LoggingSection, primary: bool) -> None:
    """Refuse a reporter that is not installed, or has no login; nothing is read or written.

    Args:
        section: the config's `logging` section.
        primary: whether this is the process that reports; the others need no library.

    Raises:
        ConfigError: one line for each.
    """
    raise_all(filter(None, map(_problem, section.report_to if primary else ())))


def _problem(name: str) -> str:
    """Say why a reporter cannot be used; empty if it can."""
    found = find_spec(name)
    if found is None or found.origin is None:  # a folder of that name here is no package
        return (
            f"logging.report_to: got {name}, which is not installed, expected a package that is; "
            f"pip install {name}"
        )
    try:
        with redirect_stdout(sys.stderr):
            REPORTERS[name].login()
    except Exception as error:  # each library, and its HTTP library, has its own
        return (
            f"logging.report_to: got {name}, which takes no run ({first_line(error)}), expected a "
            f"login that its server knows; run `{name} login`, or set {name.upper()}_MODE=offline"
        )
    return ""


def open_reporter(name: str, run: ReportedRun) -> Reporter:
    """Begin to report a run.

    Raises:
        ConfigError: the tracker of this name cannot begin.
    """
    kind = REPORTERS[name]
    if kind.ends_run:
        return kind.open(run)
    try:
        with redirect_stdout(sys.stderr):  # the libraries greet on stdout
            return Tolerant(name, kind.open(run))
    except Exception as error:
        raise ConfigError(
            f"logging.report_to: got {name}, which did not begin a run ({first_line(error)}), "
            f"expected one that does; take {name} out to run without"
        ) from error
