# SPDX-License-Identifier: Apache-2.0
"""A trace of a few steps of a run, for TensorBoard's profiler and for Perfetto.

In: `logging.profile_steps` and where the run stands. Out: a folder in `tensorboard/plugins/profile`
of the output directory, and a line on stderr that says how to open it. Process 0 traces its own
host and devices. Not done here: reading a trace.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax


class Profile:
    """Traces the steps after the first of two numbers up to the second; a context manager.

    With [a, b] the trace starts when the devices have finished step a, and ends when they have
    finished step b: it holds steps a + 1 to b with all that the loop does from the one end to the
    other. A trace that does not lie in this run whole is left out, which is said at the start; a
    signal cuts one short.

    Args:
        steps: a and b; None traces nothing, at the cost of a comparison per step.
        start: the step that the run continues from.
        total: its last step.
        folder: TensorBoard's folder of the run.
        primary: whether this process traces.
    """

    def __init__(
        self, steps: Sequence[int] | None, start: int, total: int, folder: Path, primary: bool
    ) -> None:
        self._folder, self._start = folder, start
        self._bounds = tuple(steps) if steps is not None and primary else None
        self._trace, self._step = ExitStack(), ExitStack()
        self._tracing = False
        if self._bounds and not start <= self._bounds[0] < self._bounds[1] <= total:
            print(
                f"logging.profile_steps: got {list(self._bounds)}, but this run takes steps "
                f"{start + 1} to {total}; nothing is traced",
                file=sys.stderr,
            )
            self._bounds = None

    def __enter__(self) -> "Profile":
        self.reached(self._start, None)
        return self

    def __exit__(self, *_: object) -> None:
        self._step.close()
        self._end()

    def reached(self, step: int, told: Any) -> None:
        """Say that the loop is done with a step; `told` is what that gave, on the devices."""
        if self._bounds is None:
            return
        if step in self._bounds:
            jax.block_until_ready(told)
        self._step.close()
        if step == self._bounds[0]:
            self._begin()
        elif step == self._bounds[1]:
            self._end()
        if self._tracing:
            mark = jax.profiler.StepTraceAnnotation("train", step_num=step + 1)
            self._step.enter_context(mark)

    def _begin(self) -> None:
        options = jax.profiler.ProfileOptions()
        # Python's calls, thousands a step, would slow the loop and crowd out everything else.
        options.python_tracer_level = 0
        trace = jax.profiler.trace(
            self._folder, create_perfetto_trace=True, profiler_options=options
        )
        self._trace.enter_context(trace)
        self._tracing = True

    def _end(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        self._trace.close()
        written = max((self._folder / "plugins" / "profile").iterdir())  # named by time
        print(
            f"trace: {written}; open it with `tensorboard --logdir {self._folder}` and the plugin "
            "xprof, or perfetto_trace.json.gz at https://ui.perfetto.dev",
            file=sys.stderr,
        )
