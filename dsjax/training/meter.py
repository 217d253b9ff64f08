# SPDX-License-Identifier: Apache-2.0
"""Sums over the steps since the last log, and the values of a training line that they give.

In: what the steps return. Out: the mean loss, accuracy, rates and MFU by their keys in
`metrics.jsonl`. Not done here: writing them (`metrics_log`).
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, SupportsFloat, SupportsInt


@dataclass
class _Sums:
    loss: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    tokens: int = 0

    def add(self, loss: float, weight: float, correct: float, tokens: int) -> None:
        self.loss += loss
        self.weight += weight
        self.correct += correct
        self.tokens += tokens


class Meter:
    """Sums what the steps return and gives the values of a training line.

    Sums are kept as Python floats in step order, so a resumed run that restores `state()` logs the
    very numbers of an unbroken one.

    Args:
        flops_per_token: what a token needs (`flops.token_flops`); None gives no `mfu`.
        peak_flops: of all devices together; None gives no `mfu`.
    """

    def __init__(
        self, flops_per_token: float | None = None, peak_flops: float | None = None
    ) -> None:
        self._mfu_per_rate = None
        if flops_per_token is not None and peak_flops is not None:
            self._mfu_per_rate = flops_per_token / peak_flops
        self._since_log, self._run = _Sums(), _Sums()
        self._ahead: tuple[float, float] | None = None  # loss and weight since the last log
        self._untrained = 0  # steps of the run whose batch had no trained token
        self._timed_tokens = self._tokens_here = self._steps_here = 0
        self._started = self._clock = time.monotonic()

    def start(self) -> None:
        """Start the clocks: what came before the first step is not its time."""
        self._started = self._clock = time.monotonic()

    def add(
        self,
        loss_sum: SupportsFloat,
        weight_sum: SupportsFloat,
        correct: SupportsFloat,
        tokens: SupportsInt,
        ahead: tuple[SupportsFloat, SupportsFloat] | None = None,
    ) -> None:
        """Take one optimizer step's sums over the whole batch.

        Args:
            loss_sum: sum of weight x loss over the trained tokens.
            weight_sum: sum of the weights.
            correct: sum of the weights where the most likely token was the target.
            tokens: real tokens in the batch, padding excluded, trained or not.
            ahead: sums of loss and weight of the token after the next, where it is predicted.
        """
        step = float(loss_sum), float(weight_sum), float(correct), int(tokens)
        self._since_log.add(*step)
        self._run.add(*step)
        # A step that float16 skipped tells of no token at all.
        self._untrained += step[3] > 0 and step[1] == 0
        self._timed_tokens += step[3]
        self._tokens_here += step[3]
        self._steps_here += 1
        if ahead is not None:
            loss, weight = self._ahead or (0.0, 0.0)
            self._ahead = loss + float(ahead[0]), weight + float(ahead[1])

    def values(self) -> dict[str, float | int | None]:
        """Return means since the last call and `tokens` of the whole run; start the next interval.

        A mean over no trained token is None. `mtp_loss` is there where steps told of it, and
        `untrained_steps`, of the whole run, where a batch had no trained token.
        """
        now = time.monotonic()
        rate = self._timed_tokens / max(now - self._clock, 1e-9)
        sums, self._since_log = self._since_log, _Sums()
        self._clock, self._timed_tokens = now, 0
        ahead = {} if self._ahead is None else {"mtp_loss": _mean(*self._ahead)}
        self._ahead = None
        return {
            "loss": _mean(sums.loss, sums.weight),
            "accuracy": _mean(sums.correct, sums.weight),
            "tokens": self._run.tokens,
            "tokens_per_second": rate,
            "mfu": None if self._mfu_per_rate is None else self._mfu_per_rate * rate,
            **ahead,
            **self._told_untrained(),
        }

    def summary(self) -> dict[str, float | None]:
        """Return the closing line: the loss of the whole run, the speed of this process's part."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return {
            "train_loss": _mean(self._run.loss, self._run.weight),
            "train_runtime": seconds,
            "train_steps_per_second": self._steps_here / seconds,
            "train_tokens_per_second": self._tokens_here / seconds,
            **self._told_untrained(),
        }

    def _told_untrained(self) -> dict[str, int]:
        return {"untrained_steps": self._untrained} if self._untrained else {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside (an evaluation, a compilation) out of `tokens_per_second`."""
        stopped = time.monotonic()
        try:
            yield
        finally:
            self._clock += time.monotonic() - stopped

    def state(self) -> dict[str, Any]:
        """Return the sums for the checkpoint; exact through JSON, not through float32 arrays."""
        state = {"since_log": asdict(self._since_log), "run": asdict(self._run)}
        if self._ahead is not None:
            state["ahead"] = {"loss": self._ahead[0], "weight": self._ahead[1]}
        return state | self._told_untrained()

    def run_sums(self) -> dict[str, float]:
        """Return the sums over the whole run."""
        return self.state()["run"]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._since_log = _Sums(**state["since_log"])
        self._run = _Sums(**state["run"])
        ahead = state.get("ahead")
        self._ahead = None if ahead is None else (ahead["loss"], ahead["weight"])
        self._untrained = state.get("untrained_steps", 0)


def _mean(total: float, weight: float) -> float | None:
    return total / weight if weight else None
