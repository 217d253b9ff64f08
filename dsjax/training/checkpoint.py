# SPDX-License-Identifier: Apache-2.0
"""A run's state on disk: saved in the background, whole or not at all, restored on any mesh.

In: a pytree of jax arrays (what trains, optimizer, counters, random keys) and a small JSON dict
(data position, what the run was started with).
Out: `<directory>/<step>/`, written by Orbax; and the state again, in the shardings asked for.
Not done here: deciding what the state is (`state`), resuming (`resume`), model files (`export`).

Leaves are stored flat, under their dotted path in the pytree (`opt_state.0.mu.model.norm.weight`),
so the containers around them do not matter to a reader. With the JSON dict lies the record: dtype,
shape and checksum of every leaf, and a digest of it all. What is read is held against it, so that
a damaged checkpoint is refused, and never restored as other numbers.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsjax.config import CheckpointSection
from dsjax.distributed.checksums import checksums, digest, named_leaves
from dsjax.errors import ConfigError, files_of, system_fault

T = TypeVar("T")

MOST_LINES = 8
OURS = (MemoryError, jax.errors.JaxRuntimeError)
"""What is raised while reading and says nothing about the files: no memory, a device that fails."""

EARLIER_META = {"position", "data", "meter"}
"""What lay in place of the record before there was one."""

STRAGGLERS = (
    "Event loop is closed",
    "Encountered error while reading array index",
    "sys.meta_path is None",  # at the very end, by what was never awaited
)
"""How reads and writes that a failed one leaves behind report themselves."""

NOT_BEGUN = r"coroutine '(ArrayHandler|_read_array)\S*' was never awaited"
"""What Python warns of where such a read had not begun."""


class RemovedError(ConfigError):
    """A checkpoint was removed while it was read: the run that wrote it is alive."""


def from_newest(read: Callable[[], T]) -> T:
    """Read the newest checkpoint of a run that may be alive; once more if it went away meanwhile.

    Args:
        read: opens the run's checkpoints anew, and reads.
    """
    try:
        return read()
    except RemovedError as error:
        print(f"{error}; the newest is read instead", file=sys.stderr)
        return read()


class Checkpointer:
    """The checkpoints of one run. Every process of the run makes one and calls the same methods.

    Opening it removes what a killed run left half-written, with one printed line each.
    `read_only` neither creates nor removes anything: for looking at a run that may be alive.

    `save` returns once the state is copied, and the arrays may be donated or deleted at once: from
    accelerators Orbax copies to the host; on CPU it takes a view, and as long as a view is held
    jax copies a donated buffer instead of reusing it.
    """

    def __init__(self, directory: Path, section: CheckpointSection, *, read_only: bool = False):
        self.directory = Path(directory).absolute()
        self._save_steps = section.save_steps
        self._report = sys.unraisablehook
        if not read_only:  # a write may fail at any time, in a thread
            sys.unraisablehook = _without_stragglers(self._report)
        if not read_only:
            self._announce_half_written()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=section.save_total_limit,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
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

    def due(self, step: int) -> bool:
        """Whether `save_steps` asks for a checkpoint after `step` steps."""
        return step > 0 and step % self._save_steps == 0

    def save(
        self, step: int, state: PyTree[jax.Array], meta: dict[str, Any], *, force: bool = False
    ) -> bool:
        """Start saving the state after `step` steps, if it is due or `force`d.

        Waits for an earlier save that still runs, and raises if that one failed.

        Returns:
            Whether a save was started.

        Raises:
            ConfigError: that step is there already, so another process trains in the same place; or
                the disk does not take it, or did not take the one before.
        """
        if not (force or self.due(step)):
            return False
        self._refuse_existing(step)
        leaves = named_leaves(state)
        sums = checksums(leaves)
        record = {"meta": meta, "leaves": {k: [_spec(x), sums[k]] for k, x in leaves.items()}}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves),
            meta=ocp.args.JsonSave({"record": record, "digest": digest(record)}),
        )
        # Which steps are saved is decided above; Orbax would refuse any before its latest.
        with self._written():
            return self._manager.save(step, args=items, force=True)

    def _refuse_existing(self, step: int) -> None:
        # Orbax remembers what it found at first and wrote itself, and would replace all else.
        there = jax.process_index() == 0 and (self.directory / str(step)).exists()
        if there or step in self._manager.all_steps():
            raise ConfigError(
                f"{self.directory / str(step)}: got a checkpoint of step {step} that is "
                "there already, expected none; another process trains in this directory: stop one, "
                "or choose another output_dir"
            )

    def latest(self) -> int | None:
        """Give the newest complete checkpoint's step, once a running save is done; None: none."""
        self.wait()
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any]:
        """Read what was saved beside the state.

        Raises:
            ConfigError: it cannot be read, or is not as it was saved, or (RemovedError) went away.
        """
        return self._record(step)["meta"]

    def _record(self, step: int) -> dict[str, Any]:
        """Return what was saved of the state, proven by its digest."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        stored = self._read(step, lambda: dict(self._manager.restore(step, args=items)["meta"]))
        if stored.keys() == EARLIER_META:
            raise ConfigError(
                f"{self.directory / str(step)}: got a checkpoint of an earlier version, whose "
                "arrays have no checksums, expected one that can be proven whole; finish the run "
                "with the version that began it, or choose another output_dir"
            )
        if stored.keys() != {"record", "digest"} or digest(stored["record"]) != stored["digest"]:
            raise self._damaged(step, "the record of its arrays is not as it was saved")
        return stored["record"]

    def restore(
        self, step: int, abstract_state: PyTree[jax.ShapeDtypeStruct], *, partial: bool = False
    ) -> PyTree[jax.Array]:
        """Read the state into the shardings of `abstract_state`, whatever mesh it was saved from.

        Args:
            step: a complete checkpoint's step.
            abstract_state: the pytree as it was saved, its leaves `jax.ShapeDtypeStruct` with a
                sharding.
            partial: leave stored leaves unread that `abstract_state` has not.

        Raises:
            ConfigError: the checkpoint holds other leaves, shapes or dtypes, or it cannot be read,
                or what is read is not what was saved, or (RemovedError) it went away.
        """
        wanted = named_leaves(abstract_state)
        stored = self._record(step)["leaves"]
        problems = _misfits(wanted, {name: spec for name, (spec, _) in stored.items()}, partial)
        if problems:
            raise ConfigError(self._misfit_message(step, problems))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=partial,
            )
        )
        leaves = self._read(step, lambda: self._restored(step, items))
        found = checksums({name: leaves[name] for name in wanted})
        wrong = [
            name
            for name, leaf in wanted.items()
            if found[name] != stored[name][1] or leaves[name].dtype != leaf.dtype
        ]
        if wrong:
            more = f" and of {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise self._damaged(step, f"the numbers of {wrong[0]}{more} are not those saved")
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[k] for k in wanted])

    def wait(self) -> None:
        """Wait until a running save is complete, and raise if it failed."""
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as `wait` does, then end the background threads."""
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

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        self.wait()  # The step may still be on its way to disk.
        try:
            with _silent_stragglers():
                return read()
        except Exception as error:
            # Orbax tells of an array that it cannot read in a plain Exception around the reason.
            told = error.__cause__ if type(error) is Exception else error
            if isinstance(told, OURS):
                raise
            refused = self._removed(step) or system_fault(error, self.directory / str(step))
            if refused is not None:  # that is no damage, and deleting it would not help
                raise refused from error
            reason = f"{type(told).__name__}: {str(told).strip()}".split("\n")[0][:200]
            raise self._damaged(step, reason) from error

    def _restored(self, step: int, items: ocp.args.Composite) -> dict[str, jax.Array]:
        if self._manager.item_metadata(step)["state"] is None:  # Orbax would do without
            raise FileNotFoundError("the list of arrays is missing")
        return self._manager.restore(step, args=items)["state"]

    def _removed(self, step: int) -> RemovedError | None:
        """Return what to say if a run that is alive has removed a checkpoint, or is about to.

        It does so file by file, and only when it has a newer one.
        """
        there = {int(path.name) for path in self.directory.glob("*") if path.name.isdecimal()}
        newest = max(self._manager.all_steps(), default=step)
        if step in there and max(there) <= newest:
            return None
        return RemovedError(
            f"{self.directory / str(step)}: got a checkpoint that was removed while it was read, "
            "expected it to stay; raise checkpoint.save_total_limit, or wait for the run to end"
        )

    def _damaged(self, step: int, reason: str) -> ConfigError:
        """Return what to say of a checkpoint that is not read as it was saved."""
        removed = self._removed(step)
        if removed is not None:
            return removed
        older = [s for s in self._manager.all_steps() if s < step]
        then = f"continue from step {max(older)}" if older else "begin again"
        return ConfigError(
            f"{self.directory / str(step)}: got a damaged checkpoint ({reason}), expected one that "
            f"can be read; delete this folder to {then}"
        )

    def _misfit_message(self, step: int, problems: list[str]) -> str:
        if len(problems) > MOST_LINES:
            problems = [*problems[:MOST_LINES], f"... and {len(problems) - MOST_LINES} more"]
        head = f"{self.directory / str(step)}: got a checkpoint of another model or configuration"
        fix = "resume with the configuration that wrote it, or choose another output_dir"
        return "\n  ".join([f"{head}; {fix}", *problems])


def half_written(directory: Path) -> list[Path]:
    """Return what a killed save left, which a `Checkpointer` removes when it is opened."""
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


def _misfits(wanted: dict[str, Any], stored: dict[str, str], partial: bool) -> list[str]:
    problems = [f"{k}: got nothing, expected {_spec(wanted[k])}" for k in wanted.keys() - stored]
    if not partial:
        problems += [f"{k}: got {stored[k]}, expected no such leaf" for k in stored.keys() - wanted]
    problems += [
        f"{k}: got {stored[k]}, expected {_spec(wanted[k])}"
        for k in wanted.keys() & stored
        if stored[k] != _spec(wanted[k])
    ]
    return sorted(problems)


def _spec(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # Orbax lists a random key as its words.
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
