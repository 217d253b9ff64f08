# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event file; what is added is on disk before the next line of code runs.

In: scalars and texts by step. Out: a file in the folder that TensorBoard reads. Not done here:
deciding what is shown.

tensorboardX's SummaryWriter is not used: it writes in a thread of its own, its `flush` does not
wait for that thread, and so a kill loses points of steps that a checkpoint has already passed.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from dsjax.errors import files_of

_PROTOS: Any = event_pb2  # generated code: its names exist at run time only


class EventFile:
    """One process's part of a run.

    Args:
        folder: made if it is not there.
        resume_step: what earlier files show of later steps is hidden.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        with files_of(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # The name holds the second; the rest tells apart restarts within one.
            self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{resume_step:09d}")
            start = _PROTOS.SessionLog(status=_PROTOS.SessionLog.START)
            self._write(resume_step + 1, session_log=start)
            self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the curves."""
        with files_of(self._folder):
            for tag, value in values.items():
                self._write(step, summary=summary.scalar(tag, value))
            self._file.flush()  # once: it waits for the disk, milliseconds where that is busy

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Add a text."""
        with files_of(self._folder):
            self._write(step, summary=summary.text(tag, markdown))
            self._file.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(_PROTOS.Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Close the file."""
        with files_of(self._folder):
            self._file.close()
