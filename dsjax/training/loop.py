# SPDX-License-Identifier: Apache-2.0
"""The loop over a run's steps, and what happens between them: logging, evaluation, saving.

In: the compiled step, the state, the loader. Out: the state after the last step, or after the step
at which a signal came. Lines are logged before the checkpoint of their step is saved, so that a
resumed run repeats none and lacks none. Not done here: making any of these.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from dsjax import signals
from dsjax.config import LoggingSection, RunConfig
from dsjax.distributed.processes import Hosts
from dsjax.distributed.sharding import Params
from dsjax.errors import ConfigError, first_line
from dsjax.training.checkpoint import Checkpointer
from dsjax.training.console import Progress
from dsjax.training.device_memory import peak_memory_gib
from dsjax.training.eval_results import evaluated_rows, is_evaluated, write_results
from dsjax.training.evaluation import StoppedError, evaluate_loss, to_devices
from dsjax.training.meter import Meter
from dsjax.training.metrics_log import MetricsLog
from dsjax.training.profiling import Profile
from dsjax.training.run import Programs, Run
from dsjax.training.state import StepReport, TrainState

MOST_IN_FLIGHT = 2
"""Steps that the devices have been given and have not finished: enough to keep them busy, few
enough to stop soon."""


SAME_SIGNAL = 0.3
"""Seconds within which signals count as one: `timeout` sends its to the process and its group."""


def logging_steps(section: LoggingSection, total: int) -> int:
    """Return the steps between two lines: `auto` leaves a short run enough for a picture."""
    asked = section.logging_steps
    return max(1, min(10, total // 10)) if asked == "auto" else asked


class StepsInFlight:
    """Steps that the devices may still be at; each is counted, and shown, once it is finished."""

    def __init__(self, meter: Meter, progress: Progress) -> None:
        self._meter, self._progress = meter, progress
        self._reports: deque[tuple[int, StepReport]] = deque()

    def add(self, step: int, report: StepReport) -> None:
        """Take the report of a step that has just been dispatched."""
        self._reports.append((step, report))

    def wait(self, most: int = 0) -> None:
        """Wait for the oldest steps until at most so many are left."""
        while len(self._reports) > most:
            step, report = self._reports.popleft()
            self._meter.add(jax.device_get(report.sums))
            self._progress.advance(step)


@dataclass
class Stop:
    """What a signal does to the loop: it ends after a step; or, by a second one, at once.

    Attributes:
        hosts: the processes of the run, which stop together.
        step: the one after which the loop looks next.
        number: of the first signal; None as long as none came.
        came: when it did.
    """

    hosts: Hosts
    step: int
    number: int | None = None
    came: float = 0.0

    def receive(self, number: int) -> None:
        """Take a signal, in the thread of signals."""
        now = time.monotonic()
        if self.number is not None:
            if now - self.came > SAME_SIGNAL:
                self.hosts.end_by(number)
            return
        self.number, self.came = number, now
        self.hosts.ask_to_stop(number)
        when = "" if self.hosts.count == 1 else " or soon after, together with the other processes"
        said = f"stopping after step {self.step}{when}; a second Ctrl-C or SIGTERM stops at once"
        print(said, file=sys.stderr, flush=True)

    def reached(self) -> bool:
        """Whether to stop by now; every process asks equally often."""
        return self.hosts.reached_preemption() is not None


@dataclass(frozen=True)
class Reporting:
    """Where the numbers of the steps go: summed up, written down, shown."""

    meter: Meter
    log: MetricsLog
    progress: Progress


@dataclass(frozen=True)
class Loop:
    """The steps of a run, with what happens between them.

    Attributes:
        run: what the run is.
        programs: its compiled step and evaluation.
        frozen: the arrays that no step changes.
        checkpointer: saves states.
        began: what every checkpoint tells of the run's first start: when, and with what contents.
        reporting: where the numbers go.
        publish: has the lines that are written by now seen by others, before a step is saved.
    """

    run: Run
    programs: Programs
    frozen: Params
    checkpointer: Checkpointer
    began: Mapping[str, Any]
    reporting: Reporting
    publish: Callable[[], None] = lambda: None

    def steps(self, state: TrainState, start: int) -> tuple[TrainState, int | None]:
        """Run the steps after `start`; returns the state and the signal that ended them early."""
        hosts, traced = self.run.hosts, self.run.config.logging.profile_steps
        folder = self.run.directory.tensorboard
        profile = Profile(traced, start, self.run.total, folder, hosts.primary)
        stop = Stop(hosts, start)
        with signals.sent_to(stop.receive):
            # Inside: a save that still runs is waited for before a signal can end the process, and
            # also when a step raises.
            with closing(self.checkpointer), profile:
                state = self._until_stopped(state, start, profile, stop)
            stopped = hosts.any_preemption()
        if stopped is None and stop.number is not None:
            # It came while the processes agreed to go on, too late for their answer.
            if hosts.count > 1:
                hosts.end_by(stop.number)
            stopped = stop.number
        if stopped is not None:
            done = int(state.step)
            place = self.checkpointer.place(done)
            saved = f"step {done} is saved in {place}" if done else "no step was taken"
            hosts.log_once(f"stopped by {signals.name_of(stopped)}; {saved}")
        return state, stopped

    def _until_stopped(
        self, state: TrainState, start: int, profile: Profile, stop: Stop
    ) -> TrainState:
        """Run the steps until the last, or until all processes stop for a signal."""
        meter, every = self.reporting.meter, logging_steps(self.run.config.logging, self.run.total)
        in_flight, train = StepsInFlight(meter, self.reporting.progress), self.run.data.train
        meter.start()
        # A signal may have cut off the evaluation that belongs to the step before.
        if self._evaluate_if_due(state, start, stop) or stop.reached():
            return state
        for step, batch in enumerate(train.iterate(start, self.run.total), start + 1):
            stop.step = step
            rows = to_devices(batch, self.run.setup.mesh, train)
            state, report = self.programs.train_step(state, self.frozen, rows)
            in_flight.add(step, report)
            in_flight.wait(MOST_IN_FLIGHT - 1)
            if step % every == 0 or step == self.run.total:
                in_flight.wait()
                self._check_finite(step, report)
                self._log(step, report)
            if self._evaluates_after(step):
                in_flight.wait()  # the meter's clock is about to be stopped
            cut = self._evaluate_if_due(state, step, stop)
            stopped = cut or stop.reached()
            if step == self.run.total or stopped or self.checkpointer.due(step):
                in_flight.wait()
                self._check_finite(step, report)
                self._save(step, state)
            profile.reached(step, report)
            if stopped:
                break
        return state

    def _log(self, step: int, report: StepReport) -> None:
        """Write and show the line of a step."""
        of_step = {
            "learning_rate": float(report.learning_rate),
            "grad_norm": float(report.grad_norm),
        }
        epoch = {"epoch": self.run.data.train.epoch(step)}
        values = epoch | self.reporting.meter.values(of_step) | self._gauges(report)
        if self.run.config.model.dtype == "float16":
            values |= {"loss_scale": float(report.loss_scale), "skipped_steps": int(report.skipped)}
        if report.updates_lost is not None:
            values["updates_lost"] = float(report.updates_lost)
        memory = peak_memory_gib(self.run.setup.mesh.local_devices)
        if memory is not None:
            values["device_memory_gib"] = memory
        self.reporting.log.log(step, values)
        self.reporting.progress.log(step, values)

    def _gauges(self, report: StepReport) -> dict[str, float | int]:
        """Return what the objective tells of a single step."""
        gauges = self.run.objective.gauges
        told = {name: gauge for name, gauge in gauges.items() if gauge.sum in report.sums}
        sums = jax.device_get(report.sums) if told else {}
        return {name: gauge.value(sums, self.run.setup.model) for name, gauge in told.items()}

    def _check_finite(self, step: int, report: StepReport) -> None:
        """Look at a step before it is logged or saved.

        Raises:
            ConfigError: the run has diverged. A float16 step may overflow as long as the scale of
                the loss can still be lowered.
        """
        norm = float(report.grad_norm)
        scalable = self.run.config.model.dtype == "float16" and float(report.loss_scale) > 1
        if not math.isfinite(norm) and not scalable:
            metric = self.run.objective.metrics["loss"]
            loss = metric.of({name: report.sums[name].item() for name in metric.names()})
            raise ConfigError(
                f"loss: got {loss} with gradient norm {norm} at step {step}, expected finite "
                "numbers; lower optimizer.learning_rate, or look at the data of that step. "
                "Checkpoints of earlier steps are kept"
            )

    def _save(self, step: int, state: TrainState) -> None:
        meta = {
            **self.began,
            "position": self.run.data.train.position(step),
            "meter": self.reporting.meter.state(),
        }
        self.publish()
        self.checkpointer.save(step, state, meta, force=True)

    def _evaluates_after(self, step: int) -> bool:
        every = self.run.config.training.eval_steps
        return every is not None and 0 < step < self.run.total and step % every == 0

    def _evaluate_if_due(self, state: TrainState, step: int, stop: Stop) -> bool:
        """Evaluate where `eval_steps` says; a signal cuts it off, and the next run makes up for it.

        Returns whether it did.

        An evaluation can last far longer than whoever sends SIGTERM waits before SIGKILL.
        """
        if self._evaluates_after(step) and not self.reporting.log.evaluated(step):
            with self.reporting.meter.paused():
                try:
                    self.evaluate(state, step, stop.reached)
                except StoppedError:
                    return True
        return False

    def evaluate(
        self, state: TrainState, step: int, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Evaluate and log.

        Raises:
            StoppedError: `stop()` became true first.
        """
        run, rows = self.run, self.run.data.eval
        assert rows is not None
        evaluate = partial(evaluate_loss, run.objective, self.programs.eval_step)
        with self.reporting.progress.evaluating(rows.steps_in_epoch(0)) as told:
            values = evaluate(state.trainable, self.frozen, rows, run.setup.mesh, stop, told)
        self.reporting.log.log_eval(step, values)
        self.reporting.progress.log_eval(step, values)
        return values


def no_evaluation(config: RunConfig) -> str:
    """Return the words of a command that leave out the evaluation of a run."""
    key = "data.eval" if config.data.eval is not None else "data.val_size"
    steps = " training.eval_steps=null" if config.training.eval_steps else ""
    return f"{key}=null{steps}"


def finish_evaluation(
    loop: Loop, state: TrainState, manifest: Mapping[str, Any]
) -> Exception | None:
    """Evaluate the final weights, unless a finished run did, on these rows.

    Returns:
        What went wrong, for the caller to raise after the export, which need not fail as well. Of
        several processes it may be one alone, for which the others wait: then it is raised here.
    """
    run, hosts = loop.run, loop.run.hosts
    evaluated = partial(is_evaluated, run.directory.path, manifest)
    if run.data.eval is None or hosts.broadcast_from_primary(evaluated):
        return None
    if evaluated_rows(run.directory.path) not in ("", manifest["data"]):
        loop.reporting.log.forget_evaluation(run.total)
    try:
        values = loop.evaluate(state, run.total)
        if hosts.primary:
            write_results(run.directory.path, manifest, values)
    except Exception as error:
        if hosts.count > 1:
            hosts.log_once(
                f"the evaluation failed; to leave it out, add {no_evaluation(run.config)}"
            )
            raise
        hosts.log_once(
            f"the evaluation failed: {first_line(error)}; the rest of the run comes first, "
            "then this error"
        )
        return error
    return None
