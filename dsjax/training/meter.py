# SPDX-License-Identifier: Apache-2.0
"""Sums over the steps since the last log, and the values of a training line that they give.

In: what the steps return. Out: the objective's metrics, rates and MFU by their keys in
`metrics.jsonl`. Not done here: writing them (`metrics_log`).
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.errors import ConfigError
from dsjax.objectives.objective import TOKENS, Metric, Objective


class Meter:
    """Sums what the steps return and gives the values of a training line.

    Sums are kept as Python's numbers in step order, so a resumed run that restores `state()` logs
    the very numbers of an unbroken one.

    Args:
        objective: whose sums and metrics they are.
        flops_per_token: what a token needs (`flops.token_flops`); None gives no `mfu`.
        peak_flops: of all devices together; None gives no `mfu`.
    """

    def __init__(
        self,
        objective: Objective,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self._mfu_per_rate = None
        if flops_per_token is not None and peak_flops is not None:
            self._mfu_per_rate = flops_per_token / peak_flops
        metrics = objective.metrics
        self._loss = metrics["loss"]
        self._means = {name: m for name, m in metrics.items() if not m.optional}
        self._optional = {name: m for name, m in metrics.items() if m.optional}
        self._zeros = dict.fromkeys(_names(self._means), 0.0) | {TOKENS: 0}
        self._since_log, self._run = dict(self._zeros), dict(self._zeros)
        self._untrained = 0  # steps of the run whose batch had no trained token
        self._timed_tokens = self._timed_steps = 0
        self._tokens_here = self._steps_here = 0
        self._started = self._clock = time.monotonic()

    def start(self) -> None:
        """Start the clocks: what came before the first step is not its time."""
        self._started = self._clock = time.monotonic()

    def add(self, sums: Mapping[str, Any]) -> None:
        """Take one optimizer step's sums over the whole batch: numpy scalars, among others."""
        step = {name: sums[name].item() for name in self._zeros}
        step |= {n: sums[n].item() for n in _names(self._optional) if n in sums}
        self._since_log |= {n: self._since_log.get(n, 0.0) + value for n, value in step.items()}
        self._run = {name: total + step[name] for name, total in self._run.items()}
        tokens = step[TOKENS]
        # A step that float16 skipped tells of no token at all.
        self._untrained += tokens > 0 and self._loss.of(step) is None
        self._timed_tokens += tokens
        self._timed_steps += 1
        self._tokens_here += tokens
        self._steps_here += 1

    def values(self, of_step: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return means since the last call and `tokens` of the whole run; start the next interval.

        A mean over nothing, such as no trained token, is None. Optional metrics are there where
        steps told of them, and `untrained_steps`, of the whole run, where a batch had no trained
        token. `step_time` is in seconds.

        Args:
            of_step: values of the last step alone; they are written after the means.
        """
        now = time.monotonic()
        seconds, steps = max(now - self._clock, 1e-9), self._timed_steps
        rate = self._timed_tokens / seconds
        sums, self._since_log = self._since_log, dict(self._zeros)
        self._clock, self._timed_tokens, self._timed_steps = now, 0, 0
        return {
            **{name: metric.of(sums) for name, metric in self._means.items()},
            **(of_step or {}),
            "tokens": self._run[TOKENS],
            "tokens_per_second": rate,
            "mfu": None if self._mfu_per_rate is None else self._mfu_per_rate * rate,
            "step_time": seconds / steps if steps else None,
            **{name: m.of(sums) for name, m in self._optional.items() if m.sum in sums},
            **self._told_untrained(),
        }

    def summary(self) -> dict[str, float | None]:
        """Return the closing line: the loss of the whole run, the speed of this process's part."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return {
            "train_loss": self._loss.of(self._run),
            "train_runtime": seconds,
            "train_steps_per_second": self._steps_here / seconds,
            "train_tokens_per_second": self._tokens_here / seconds,
            **self._told_untrained(),
        }

    def _told_untrained(self) -> dict[str, int]:
        return {"untrained_steps": self._untrained} if self._untrained else {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside (an evaluation, a compilation) out of speeds and `step_time`."""
        stopped = time.monotonic()
        try:
            yield
        finally:
            self._clock += time.monotonic() - stopped

    def state(self) -> dict[str, Any]:
        """Return the sums for the checkpoint; exact through JSON, not through float32 arrays."""
        state = {"since_log": dict(self._since_log), "run": self.run_sums()}
        return state | self._told_untrained()

    def run_sums(self) -> dict[str, float | int]:
        """Return the sums over the whole run."""
        return dict(self._run)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            ConfigError: another version returned it, whose objective had other sums.
        """
        found, wanted = sorted(state["run"]), sorted(self._zeros)
        if found != wanted or not set(wanted) <= set(state["since_log"]):
            raise ConfigError(
                f"checkpoints: got one with sums of {', '.join(found)}, expected those of "
                f"{', '.join(wanted)}; finish the run with the version that began it, or choose "
                "another output_dir"
            )
        # Earlier versions kept apart what the module for multi-token prediction summed up to.
        ahead = {f"mtp_{name}": value for name, value in state.get("ahead", {}).items()}
        self._since_log, self._run = {**state["since_log"], **ahead}, dict(state["run"])
        self._untrained = state.get("untrained_steps", 0)


def _names(metrics: Mapping[str, Metric]) -> list[str]:
    """Name the sums that metrics need."""
    return [name for metric in metrics.values() for name in metric.names()]
