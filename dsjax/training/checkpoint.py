# SPDX-License-Identifier: Apache-2.0
"""A run's state on disk: saved in the background, whole or not at all, restored on any mesh.

In: a pytree of jax arrays (what trains, optimizer, counters, random keys) and a small JSON dict
(data position, what the run was started with).
Out: `<folder>/<step>/`, and the state again, in the shardings asked for. Not done here: how it lies
in a folder (`orbax_store`) or in a bucket (`bucket_store`); what the state is (`state`).

Leaves are stored flat, under their dotted path in the pytree (`opt_state.0.mu.model.norm.weight`),
so the containers around them do not matter to a reader. With the JSON dict lies the record: dtype,
shape and checksum of every leaf, and a digest of it all. What is read is held against it, so that
a damaged checkpoint is refused, and never restored as other numbers.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dsjax.buckets import Bucket
from dsjax.config import CheckpointSection
from dsjax.distributed.checksums import checksums, digest, named_leaves
from dsjax.errors import ConfigError, system_fault
from dsjax.training.bucket_store import BucketStore, is_from_bucket
from dsjax.training.orbax_store import OrbaxStore

T = TypeVar("T")

MOST_LINES = 8
OURS = (MemoryError, jax.errors.JaxRuntimeError)
"""What is raised while reading and says nothing about the files: no memory, a device that fails."""

EARLIER_META = {"position", "data", "meter"}
"""What lay in place of the record before there was one."""


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


class Store(Protocol):
    """Where checkpoints lie; `OrbaxStore` describes the methods."""

    def place(self, step: int) -> str: ...
    def steps(self) -> list[int]: ...
    def steps_there(self) -> set[int]: ...
    def save(
        self, step: int, leaves: Mapping[str, jax.Array], record: Mapping[str, Any]
    ) -> None: ...
    def read_record(self, step: int) -> dict[str, Any]: ...
    def read_leaves(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], *, partial: bool
    ) -> dict[str, jax.Array]: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


class Checkpointer:
    """The checkpoints of one run. Every process of the run makes one and calls the same methods.

    Opening it removes what a killed run left half-written, with one printed line each.
    `read_only` neither creates nor removes anything: for looking at a run that may be alive.
    `save` returns once the state is copied, and the arrays may be donated or deleted at once.

    Args:
        folder: of the checkpoints, on a file system or in a bucket.
        section: the config's `checkpoint` section.
        read_only: as said.
    """

    def __init__(
        self, folder: Path | Bucket, section: CheckpointSection, *, read_only: bool = False
    ) -> None:
        self._save_steps = section.save_steps
        keep = section.save_total_limit
        if isinstance(folder, Path) and is_from_bucket(folder):
            folder = Bucket.open(f"file://{folder.absolute()}", "output_dir")
        self._store: Store = (
            BucketStore(folder, keep, read_only=read_only)
            if isinstance(folder, Bucket)
            else OrbaxStore(folder, keep, read_only=read_only)
        )

    def place(self, step: int) -> str:
        """Name a checkpoint for messages."""
        return self._store.place(step)

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
        self._store.save(step, leaves, {"record": record, "digest": digest(record)})
        return True

    def _refuse_existing(self, step: int) -> None:
        # A store remembers what it found at first and wrote itself, and would replace all else.
        there = jax.process_index() == 0 and step in self._store.steps_there()
        if there or step in self._store.steps():
            raise ConfigError(
                f"{self.place(step)}: got a checkpoint of step {step} that is "
                "there already, expected none; another process trains in this directory: stop one, "
                "or choose another output_dir"
            )

    def latest(self) -> int | None:
        """Give the newest complete checkpoint's step, once a running save is done; None: none."""
        self.wait()
        return max(self._store.steps(), default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """Read what was saved beside the state.

        Raises:
            ConfigError: it cannot be read, or is not as it was saved, or (RemovedError) went away.
        """
        return self._record(step)["meta"]

    def _record(self, step: int) -> dict[str, Any]:
        """Return what was saved of the state, proven by its digest."""
        stored = self._read(step, lambda: self._store.read_record(step))
        if stored.keys() == EARLIER_META:
            raise ConfigError(
                f"{self.place(step)}: got a checkpoint of an earlier version, whose "
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
        leaves = self._read(step, lambda: self._store.read_leaves(step, wanted, partial=partial))
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
        self._store.wait()

    def close(self) -> None:
        """Wait as `wait` does, then end the background threads."""
        self._store.close()

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        self.wait()  # The step may still be on its way to disk.
        try:
            return read()
        except Exception as error:
            # Orbax tells of an array that it cannot read in a plain Exception around the reason.
            told = error.__cause__ if type(error) is Exception else error
            if isinstance(told, OURS):
                raise
            refused = self._removed(step) or system_fault(error, self.place(step))
            if refused is not None:  # that is no damage, and deleting it would not help
                raise refused from error
            reason = f"{type(told).__name__}: {str(told).strip()}".split("\n")[0][:200]
            raise self._damaged(step, reason) from error

    def _removed(self, step: int) -> RemovedError | None:
        """Return what to say if a run that is alive has removed a checkpoint, or is about to.

        It does so file by file, and only when it has a newer one.
        """
        there = self._store.steps_there()
        newest = max(self._store.steps(), default=step)
        if step in there and max(there) <= newest:
            return None
        return RemovedError(
            f"{self.place(step)}: got a checkpoint that was removed while it was read, "
            "expected it to stay; raise checkpoint.save_total_limit, or wait for the run to end"
        )

    def _damaged(self, step: int, reason: str) -> ConfigError:
        """Return what to say of a checkpoint that is not read as it was saved."""
        removed = self._removed(step)
        if removed is not None:
            return removed
        older = [s for s in self._store.steps() if s < step]
        then = f"continue from step {max(older)}" if older else "begin again"
        return ConfigError(
            f"{self.place(step)}: got a damaged checkpoint ({reason}), expected one that "
            f"can be read; delete this folder to {then}"
        )

    def _misfit_message(self, step: int, problems: list[str]) -> str:
        if len(problems) > MOST_LINES:
            problems = [*problems[:MOST_LINES], f"... and {len(problems) - MOST_LINES} more"]
        head = f"{self.place(step)}: got a checkpoint of another model or configuration"
        fix = "resume with the configuration that wrote it, or choose another output_dir"
        return "\n  ".join([f"{head}; {fix}", *problems])


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
