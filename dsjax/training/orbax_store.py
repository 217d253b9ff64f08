# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a folder of a file system, as Orbax writes and reads them.

In: arrays by name, and a record of them that JSON can hold. Out: `<directory>/<step>/`, there whole
or not at all, written in the background; the arrays again, in the shardings asked for. Not done
here: which steps are saved, and proving that what is read was saved (`checkpoint`).
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsjax.errors import files_of

STRAGGLERS = (
    "Event loop is closed",
    "Encountered error while reading array index",
    "sys.meta_path is None",  # at the very end, by what was never awaited
)
"""How reads and writes that a failed one leaves behind report themselves."""

NOT_BEGUN = r"coroutine '(ArrayHandler|_read_array)\S*' was never awaited"
"""What Python warns of where such a read had not begun."""


class OrbaxStore:
    """The checkpoints in one folder. Every process of the run makes one and calls the same methods.

    Opening it removes what a killed run left half-written, with one printed line each.
    `read_only` neither creates nor removes anything: for looking at a run that may be alive.

    `save` returns once the state is copied, and the arrays may be donated or deleted at once: from
    accelerators Orbax copies to the host; on CPU it takes a view, and as long as a view is held
    jax copies a donated buffer instead of reusing it.

    Args:
        directory: of the run's checkpoints.
        keep: how many of the newest; None for all.
        read_only: as said.
    """

    def __init__(self, directory: Path, keep: int | None, *, read_only: bool = False) -> None:
        self.directory = directory.absolute()
        self._keep, self._read_only = keep, read_only
        self._report = sys.unraisablehook
        if not read_only:  # a write may fail at any time, in a thread
            sys.unraisablehook = _without_stragglers(self._report)
            self._announce_half_written()
            self._manager.directory  # noqa: B018  what is half-written goes now

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                create=not self._read_only,
                cleanup_tmp_directories=not self._read_only,
                read_only=self._read_only,
                # Opening must not stumble over a folder that a kill left half-deleted.
                lightweight_initialize=True,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def _announce_half_written(self) -> None:
        if jax.process_index() == 0:
            for path in half_written(self.directory):
                print(f"{path}: an unfinished checkpoint, not used and removed", file=sys.stderr)

    def place(self, step: int) -> str:
        """Name a checkpoint for messages."""
        return str(self.directory / str(step))

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, as far as this process knows them."""
        return list(self._manager.all_steps()) if self.directory.is_dir() else []

    def steps_there(self) -> set[int]:
        """List the steps of which anything is there now, whoever wrote it."""
        return {int(path.name) for path in self.directory.glob("*") if path.name.isdecimal()}

    def save(self, step: int, leaves: Mapping[str, jax.Array], record: Mapping[str, Any]) -> None:
        """Start saving; wait for an earlier save first, and raise if that one failed."""
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(dict(leaves)), meta=ocp.args.JsonSave(dict(record))
        )
        with self._written():  # Orbax would refuse any step before its latest
            self._manager.save(step, args=items, force=True)

    def read_record(self, step: int) -> dict[str, Any]:
        """Read what was saved beside the arrays."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        with _silent_stragglers():
            return dict(self._manager.restore(step, args=items)["meta"])

    def read_leaves(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], *, partial: bool
    ) -> dict[str, jax.Array]:
        """Read arrays into their shardings; `partial` leaves others of the checkpoint unread."""
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                dict(wanted),
                restore_args=ocp.checkpoint_utils.construct_restore_args(dict(wanted)),
                partial_restore=partial,
            )
        )
        with _silent_stragglers():
            if self._manager.item_metadata(step)["state"] is None:  # Orbax would do without
                raise FileNotFoundError("the list of arrays is missing")
            return self._manager.restore(step, args=items)["state"]

    def wait(self) -> None:
        """Wait until a running save is complete, and raise if it failed."""
        if "_manager" in self.__dict__:
            with self._written():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as `wait` does, then end the background threads."""
        if "_manager" in self.__dict__:
            with self._written():
                self._manager.close()
        sys.unraisablehook = self._report

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Tell what the disk refuses by one message; a thread of Orbax may have met it earlier."""
        try:
            with files_of(self.directory):
                yield
        except Exception:
            self._report = sys.unraisablehook  # what is left behind stays muted
            raise


def half_written(directory: Path) -> list[Path]:
    """Return what a killed save left, which an `OrbaxStore` removes when it is opened."""
    return sorted(directory.glob(f"*{ocp.path.atomicity.TMP_DIR_SUFFIX}*"))


@contextmanager
def _silent_stragglers() -> Iterator[None]:
    """Keep reads and writes that a failed one leaves behind from printing tracebacks.

    When one fails, Orbax closes its event loop under the others; each of them, once done or
    given up, reports it to `sys.unraisablehook`, also long after, and Python warns of each that
    had not begun. So after a failure, with which the run ends, these reports stay muted.
    """
    report = sys.unraisablehook
    sys.unraisablehook = _without_stragglers(report)
    try:
        yield
    except Exception:
        warnings.filterwarnings("ignore", NOT_BEGUN, RuntimeWarning)
        raise
    sys.unraisablehook = report


def _without_stragglers(report: Callable[[Any], object]) -> Callable[[Any], object]:
    def report_others(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(STRAGGLERS):
            report(unraisable)

    return report_others
