# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event file; what is added is on disk before the next line of code runs.

In: scalars and texts by step. Out: a file in the folder that TensorBoard reads. Not done here:
deciding what is shown.

Records and messages are tensorboard's own. Its EventFileWriter is not used: it writes in a thread,
which prints a traceback where the disk is full, does not fsync, and imports tensorflow if it can.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.text import metadata as text_plugin
from tensorboard.summary.writer.record_writer import RecordWriter

from dsjax.errors import files_of

# Generated code: its names exist at run time only.
_EVENT: Any = event_pb2
_SUMMARY: Any = summary_pb2
_TENSOR: Any = tensor_pb2
_SHAPE: Any = tensor_shape_pb2
_TYPES: Any = types_pb2


class EventFile:
    """One process's part of a run.

    Args:
        folder: made if it is not there.
        resume_step: what earlier files show of later steps is hidden.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        # TensorBoard reads files in the order of names: first the second, then what tells apart
        # restarts within one.
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{resume_step:09d}"
        with files_of(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"events.out.tfevents.{name}").open("wb")
            self._records = RecordWriter(self._file)
            self._write(0, file_version="brain.Event:2")
            start = _EVENT.SessionLog(status=_EVENT.SessionLog.START)
            self._write(resume_step + 1, session_log=start)
            self._flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the curves."""
        with files_of(self._folder):
            for tag, value in values.items():
                point = _SUMMARY.Summary.Value(tag=tag, simple_value=value)
                self._write(step, summary=_SUMMARY.Summary(value=[point]))
            self._flush()  # once: it waits for the disk, milliseconds where that is busy

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Add a text, shown under `<tag>/text_summary`."""
        value = _SUMMARY.Summary.Value(
            tag=f"{tag}/text_summary",
            metadata=text_plugin.create_summary_metadata("", ""),
            tensor=_TENSOR.TensorProto(
                dtype=_TYPES.DT_STRING,
                string_val=[markdown.encode()],
                tensor_shape=_SHAPE.TensorShapeProto(dim=[_SHAPE.TensorShapeProto.Dim(size=1)]),
            ),
        )
        with files_of(self._folder):
            self._write(step, summary=_SUMMARY.Summary(value=[value]))
            self._flush()

    def _write(self, step: int, **content: Any) -> None:
        event = _EVENT.Event(wall_time=time.time(), step=step, **content)
        self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        """Close the file, which does not say how the run ended."""
        del failed
        with files_of(self._folder):
            self._file.close()
