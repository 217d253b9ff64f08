# SPDX-License-Identifier: Apache-2.0
"""A run's state on disk: saved in the background, whole or not at all, restored on any mesh.

In: a pytree of jax arrays (what trains, optimizer, counters, random keys) and a small JSON dict
(data position, what the run was started with).
Out: `<directory>/<step>/`, written by Orbax; and the state again, in the shardings asked for.
Not done here: deciding what the state is (step.py), resuming (train.py), model files (export.py).

Leaves are stored flat, under their dotted path in the pytree (`opt_state.0.mu.model.norm.weight`),
so the containers around them do not matter to a reader.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsjax.config import CheckpointSection
from dsjax.errors import ConfigError

MOST_LINES = 8
UNREADABLE = (OSError, ValueError, KeyError, TypeError)
"""What Orbax and TensorStore raise on damaged files; running out of memory is none of them."""

STRAGGLERS = ("Event loop is closed", "Encountered error while reading array index")
"""How reads that a failed one leaves behind report themselves."""


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
            for path in sorted(self.directory.glob(f"*{ocp.path.atomicity.TMP_DIR_SUFFIX}*")):
                print(f"{path}: an unfinished checkpoint, not used and removed", file=sys.stderr)

    def due(self, step: int) -> bool:
        """Whether `save_steps` asks for a checkpoint after `step` steps."""
        return step > 0 and step % self._save_steps == 0

    def save(
        self, step: int, state: PyTree[jax.Array], meta: dict[str, Any], *, force: bool = False
    ) -> bool:
        """Start saving the state after `step` steps, if it is due or `force`d and not there yet.

        Waits for an earlier save that still runs, and raises if that one failed.

        Returns:
            Whether a save was started.
        """
        if not (force or self.due(step)) or step in self._manager.all_steps():
            return False
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(named_leaves(state)), meta=ocp.args.JsonSave(meta)
        )
        # Which steps are saved is decided above; Orbax would refuse any before its latest.
        return self._manager.save(step, args=items, force=True)

    def latest(self) -> int | None:
        """Give the newest complete checkpoint's step, once a running save is done; None: none."""
        self.wait()
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any]:
        """Read what was saved beside the state.

        Raises:
            ConfigError: it cannot be read.
        """
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._read(step, lambda: self._manager.restore(step, args=items)["meta"])

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
            ConfigError: the checkpoint holds other leaves, shapes or dtypes, or cannot be read.
        """
        wanted = named_leaves(abstract_state)
        stored = self._read(step, lambda: self._stored_leaves(step))
        problems = _misfits(wanted, stored, partial)
        if problems:
            raise ConfigError(self._misfit_message(step, problems))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=partial,
            )
        )
        leaves = self._read(step, lambda: self._manager.restore(step, args=items)["state"])
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[k] for k in wanted])

    def wait(self) -> None:
        """Wait until a running save is complete, and raise if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as `wait` does, then end the background threads."""
        self._manager.close()

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        self.wait()  # The step may still be on its way to disk.
        try:
            with _silent_stragglers():
                return read()
        except Exception as error:
            # Orbax tells of an array that it cannot read in a plain Exception around the reason.
            told = error.__cause__ if type(error) is Exception else error
            if not isinstance(told, UNREADABLE):
                raise
            older = [s for s in self._manager.all_steps() if s < step]
            then = f"continue from step {max(older)}" if older else "start anew"
            reason = str(told).strip().split("\n")[0][:200]
            raise ConfigError(
                f"{self.directory / str(step)}: got a damaged checkpoint ({reason}), expected one "
                f"that can be read; delete this folder to {then}"
            ) from error

    def _stored_leaves(self, step: int) -> dict[str, Any]:
        metadata = self._manager.item_metadata(step)["state"]
        if metadata is None:  # Orbax's answer where the file that lists the arrays is gone.
            raise FileNotFoundError("the list of arrays is missing")
        return metadata.tree

    def _misfit_message(self, step: int, problems: list[str]) -> str:
        if len(problems) > MOST_LINES:
            problems = [*problems[:MOST_LINES], f"... and {len(problems) - MOST_LINES} more"]
        head = f"{self.directory / str(step)}: got a checkpoint of another model or configuration"
        fix = "resume with the configuration that wrote it, or choose another output_dir"
        return "\n  ".join([f"{head}; {fix}", *problems])


@contextmanager
def _silent_stragglers() -> Iterator[None]:
    """Keep reads that a failed one leaves behind from printing tracebacks.

    When one read fails, Orbax closes its event loop under the others; each of them, once done or
    given up, reports it to `sys.unraisablehook`, also long after. So after a failure, with which
    the run ends, these reports stay muted.
    """
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(STRAGGLERS):
            report(unraisable)

    sys.unraisablehook = report_others
    yield
    sys.unraisablehook = report


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Give each leaf its dotted path as name, in the pytree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    assert len(names) == len(leaves), "two leaves of the state have the same dotted path"
    return names


def _misfits(wanted: dict[str, Any], stored: dict[str, Any], partial: bool) -> list[str]:
    problems = [f"{k}: got nothing, expected {_spec(wanted[k])}" for k in wanted.keys() - stored]
    if not partial:
        problems += [
            f"{k}: got {_spec(stored[k])}, expected no such leaf" for k in stored.keys() - wanted
        ]
    problems += [
        f"{k}: got {_spec(stored[k])}, expected {_spec(wanted[k])}"
        for k in wanted.keys() & stored
        if _spec(stored[k]) != _spec(wanted[k])
    ]
    return sorted(problems)


def _spec(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # Orbax lists a random key as its words.
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
