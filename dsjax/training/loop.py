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
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax import signals
from dsjax.config import RunConfig
from dsjax.data import Loader
from dsjax.distributed.processes import Hosts
from dsjax.distributed.sharding import Params
from dsjax.errors import ConfigError, first_line
from dsjax.training.checkpoint import Checkpointer
from dsjax.training.console import Progress
from dsjax.training.eval_results import evaluated_rows, is_evaluated, write_results
from dsjax.training.evaluation import StoppedError, evaluate_loss, to_devices
from dsjax.training.meter import Meter
from dsjax.training.metrics_log import BOARD, MetricsLog
from dsjax.training.profiling import Profile
from dsjax.training.setup import Assembly
from dsjax.training.state import StepReport, TrainState

MOST_IN_FLIGHT = 2
"""Steps that the devices have been given and have not finished: enough to keep them busy, few
enough to stop soon."""


SAME_SIGNAL = 0.3
"""Seconds within which signals count as one: `timeout` sends its to the process and its group."""


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
            sums = jax.device_get(report.sums)
            after = None if sums.ahead is None else (sums.ahead.loss, sums.ahead.weight)
            self._meter.add(sums.loss, sums.weight, sums.correct, sums.tokens, after)
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
        said = f"stopping after step {self.step}{when}; again to stop now"
        print(said, file=sys.stderr, flush=True)

    def reached(self) -> bool:
        """Whether to stop by now; every process asks equally often."""
        return self.hosts.reached_preemption() is not None


@dataclass(frozen=True)
class Loop:
    """The steps of a run, with what happens between them.

    `began` is what every checkpoint tells of the run's first start: when, and with what contents.
    """

    config: RunConfig
    setup: Assembly
    train: Loader
    eval: Loader | None
    began: Mapping[str, Any]
    total: int
    frozen: Params
    train_step: Any
    eval_step: Any
    checkpointer: Checkpointer
    hosts: Hosts

    def run(
        self, state: TrainState, start: int, meter: Meter, log: MetricsLog, progress: Progress
    ) -> tuple[TrainState, int | None]:
        """Run the steps from `start`; returns the state and the signal that ended them early."""
        traced, folder = self.config.logging.profile_steps, Path(self.config.output_dir)
        profile = Profile(traced, start, self.total, folder / BOARD, self.hosts.primary)
        stop = Stop(self.hosts, start)
        with signals.sent_to(stop.receive):
            # Inside: a save that still runs is waited for before a signal can end the process, and
            # also when a step raises.
            with closing(self.checkpointer), profile:
                state = self._steps(state, start, meter, log, progress, profile, stop)
            stopped = self.hosts.any_preemption()
        if stopped is None and stop.number is not None:
            # It came while the processes agreed to go on, too late for their answer.
            self.hosts.end_by(stop.number)
        if stopped is not None:
            done = int(state.step)
            place = self.checkpointer.directory / str(done)
            saved = f"step {done} is saved in {place}" if done else "no step was taken"
            self.hosts.log_once(f"stopped by signal {stopped}; {saved}")
        return state, stopped

    def _steps(
        self,
        state: TrainState,
        start: int,
        meter: Meter,
        log: MetricsLog,
        progress: Progress,
        profile: Profile,
        stop: Stop,
    ) -> TrainState:
        """Run the steps until the last, or until all processes stop for a signal."""
        every, in_flight = self.config.logging.logging_steps, StepsInFlight(meter, progress)
        meter.start()
        # A signal may have cut off the evaluation that belongs to the step before.
        if self._evaluate_if_due(state, start, meter, log, progress, stop) or stop.reached():
            return state
        for step, batch in enumerate(self.train.iterate(start, self.total), start + 1):
            stop.step = step
            rows = to_devices(batch, self.setup.mesh, self.train)
            state, report = self.train_step(state, self.frozen, rows)
            in_flight.add(step, report)
            in_flight.wait(MOST_IN_FLIGHT - 1)
            if step % every == 0 or step == self.total:
                in_flight.wait()
                self._check_finite(step, report)
                values = self._values(step, meter, report)
                log.log(step, values)
                progress.log(step, values)
            if self._evaluates_after(step):
                in_flight.wait()  # the meter's clock is about to be stopped
            cut = self._evaluate_if_due(state, step, meter, log, progress, stop)
            stopped = cut or stop.reached()
            if step == self.total or stopped or self.checkpointer.due(step):
                in_flight.wait()
                self._check_finite(step, report)
                self._save(step, state, meter)
            profile.reached(step, report)
            if stopped:
                break
        return state

    def _values(self, step: int, meter: Meter, report: StepReport) -> dict[str, Any]:
        """The line of a step."""
        values = meter.values() | {
            "epoch": self.train.epoch(step),
            "learning_rate": float(report.learning_rate),
            "grad_norm": float(report.grad_norm),
        }
        if report.sums.tokens_per_expert is not None:
            values |= expert_values(
                np.asarray(report.sums.tokens_per_expert), int(report.sums.tokens), self._chosen
            )
        if self.config.model.dtype == "float16":
            values |= {"loss_scale": float(report.loss_scale), "skipped_steps": int(report.skipped)}
        if report.updates_lost is not None:
            values["updates_lost"] = float(report.updates_lost)
        return values

    @property
    def _chosen(self) -> int:
        """Experts that one token is sent to."""
        return self.setup.model.config.router.num_experts_per_tok

    def _check_finite(self, step: int, report: StepReport) -> None:
        """Look at a step before it is logged or saved.

        Raises:
            ConfigError: the run has diverged. A float16 step may overflow as long as the scale of
                the loss can still be lowered.
        """
        norm, sums = float(report.grad_norm), report.sums
        scalable = self.config.model.dtype == "float16" and float(report.loss_scale) > 1
        if not math.isfinite(norm) and not scalable:
            loss = float(sums.loss) / (float(sums.weight) or 1.0)
            raise ConfigError(
                f"loss: got {loss} with gradient norm {norm} at step {step}, expected finite "
                "numbers; lower optimizer.learning_rate, or look at the data of that step. "
                "Checkpoints of earlier steps are kept"
            )

    def _save(self, step: int, state: TrainState, meter: Meter) -> None:
        meta = {
            **self.began,
            "position": self.train.position(step),
            "meter": meter.state(),
        }
        self.checkpointer.save(step, state, meta, force=True)

    def _evaluates_after(self, step: int) -> bool:
        every = self.config.training.eval_steps
        return every is not None and 0 < step < self.total and step % every == 0

    def _evaluate_if_due(
        self,
        state: TrainState,
        step: int,
        meter: Meter,
        log: MetricsLog,
        progress: Progress,
        stop: Stop,
    ) -> bool:
        """Evaluate where `eval_steps` says; a signal cuts it off, and the next run makes up for it.

        Returns whether it did.

        An evaluation can last far longer than whoever sends SIGTERM waits before SIGKILL.
        """
        if self._evaluates_after(step) and not log.evaluated(step):
            with meter.paused():
                try:
                    self.evaluate(state, step, log, progress, stop.reached)
                except StoppedError:
                    return True
        return False

    def evaluate(
        self,
        state: TrainState,
        step: int,
        log: MetricsLog,
        progress: Progress,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Evaluate and log.

        Raises:
            StoppedError: `stop()` became true first.
        """
        assert self.eval is not None
        values = evaluate_loss(
            self.eval_step, state.trainable, self.frozen, self.eval, self.setup.mesh, stop
        )
        log.log_eval(step, values)
        progress.log_eval(step, values)
        return values


def expert_values(loads_LE: np.ndarray, tokens: int, chosen: int) -> dict[str, float]:
    """How even the experts' work was in one step.

    Args:
        loads_LE: tokens that each expert of each layer took.
        tokens: of the batch.
        chosen: experts that one token is sent to.

    Returns:
        `expert_imbalance`: the busiest expert's load over the mean load, averaged over the layers
        (1 is even; the module for multi-token prediction is not among them); `dropped_tokens`:
        choices that no expert computed, of all layers.
    """
    means_L = loads_LE.mean(axis=1)
    return {
        "expert_imbalance": float(np.mean(loads_LE.max(axis=1) / np.maximum(means_L, 1e-30))),
        "dropped_tokens": int(tokens * chosen * len(loads_LE) - loads_LE.sum()),
    }


def no_evaluation(config: RunConfig) -> str:
    """The words of a command that leave out the evaluation of a run."""
    key = "data.eval" if config.data.eval is not None else "data.val_size"
    steps = " training.eval_steps=null" if config.training.eval_steps else ""
    return f"{key}=null{steps}"


def finish_evaluation(
    run: Path,
    loop: Loop,
    state: TrainState,
    log: MetricsLog,
    progress: Progress,
    manifest: Mapping[str, Any],
) -> Exception | None:
    """Evaluate the final weights, unless a finished run did, on these rows.

    Returns:
        What went wrong, for the caller to raise after the export, which need not fail as well. Of
        several processes it may be one alone, for which the others wait: then it is raised here.
    """
    hosts = loop.hosts
    if loop.eval is None or hosts.broadcast_from_primary(lambda: is_evaluated(run, manifest)):
        return None
    if evaluated_rows(run) not in ("", manifest["data"]):
        log.forget_evaluation(loop.total)
    try:
        values = loop.evaluate(state, loop.total, log, progress)
        if hosts.primary:
            write_results(run, manifest, values)
    except Exception as error:
        if hosts.count > 1:
            hosts.log_once(
                f"the evaluation failed; with {no_evaluation(loop.config)} the run ends without"
            )
            raise
        hosts.log_once(
            f"the evaluation failed: {first_line(error)}; what is left to do is done first"
        )
        return error
    return None
