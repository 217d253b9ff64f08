# SPDX-License-Identifier: Apache-2.0
"""A run's output directory as its processes take it: proven shared, made, and held by a lock.

In: the run's files by their names (`run_dir`), and the processes. Out: a directory, or a folder of
a bucket, that all processes of the run share, and that no other run changes meanwhile. Not done
here: the lock itself (`distributed.lock_file`, `distributed.lease`), an earlier run's files
(`resume`).
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dsjax import signals
from dsjax.buckets import Bucket, Place
from dsjax.distributed.coordinator import numbered
from dsjax.distributed.lease import leased
from dsjax.distributed.lock_file import locked
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.training.run_dir import CHECKPOINTS, RunDir
from dsjax.training.working_copy import WorkingCopy, shown_as_url
from dsjax.weights.folders import check_possible

SHARED_WITHIN = 20.0
"""Seconds after which a file that one process wrote must be there for the others."""


def check_shared(run: RunDir, hosts: Hosts, within: float = SHARED_WITHIN) -> None:
    """Prove that the output directory is one and the same for all processes of the run.

    Process 0 leaves a file where the directory is, or is going to be, for as long as it takes.

    Raises:
        ConfigError: some process does not see it.
    """
    if hosts.count == 1:
        return
    check_possible(run.path, "output_dir")
    places = (run.path.absolute(), *run.path.absolute().parents)

    def leave() -> tuple[int, str]:
        name = f".dsjax-{uuid.uuid4().hex}"
        for above, place in enumerate(places):
            with suppress(FileNotFoundError, NotADirectoryError):
                (place / name).touch()
                return above, name
        raise FileNotFoundError(run.path)

    above, name = hosts.broadcast_from_primary(leave)
    # Where the working directory is not as deep as process 0's, the folder may be another's.
    place = places[min(above, len(places) - 1)]
    token, deadline = place / name, time.monotonic() + within
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = hosts.all_gather_text(json.dumps(token.exists()))
    if hosts.primary:
        token.unlink()
    blind = [process for process, answer in enumerate(seen) if not json.loads(answer)]
    if blind:
        raise ConfigError(
            f"output_dir: got {str(run)!r}, which is another folder for {numbered(blind)} than for "
            "process 0, expected one that all share; use an absolute path on NFS, Filestore, "
            "Lustre or a mounted bucket"
        )


@contextmanager
def locked_run_dir(
    run: RunDir, hosts: Hosts | None = None, keep: bool = True
) -> Iterator[Callable[[], None]]:
    """Make the output directory and lock it, before anything in it is looked at, to the end.

    Of several processes the first does so, for all. A run that is refused leaves no folder that was
    not there before.

    Args:
        run: the run's files.
        hosts: this process among those of the run; None for a process alone.
        keep: False leaves no such folder either where nothing is refused.

    Returns:
        What to call for others to see the small files as they are: they lie in a bucket then.

    Raises:
        ConfigError: another process is training there, or no folder can be made.
    """
    hosts = hosts or Hosts()
    refusal = (
        f"output_dir: got {str(run)!r}, in which another process is training, expected none; "
        "wait for it, or choose another output_dir"
    )
    bucket = run.bucket
    if bucket is not None:
        with _leased_run(run, bucket, hosts, refusal, keep) as publish:
            yield publish
        return
    check_possible(run.path, "output_dir")
    check_shared(run, hosts)
    if not hosts.primary:
        hosts.barrier()
        _await_folder(run.path)
        yield lambda: None
        return
    made = [
        place for place in (run.path.absolute(), *run.path.absolute().parents) if not place.exists()
    ]
    checkpoints = [run.path / CHECKPOINTS] if made else []
    with (
        _removed_if_refused(made, keep),
        locked(run.lock, refusal),
        _removed_if_refused(checkpoints, keep),  # while it is locked: they could be another's
    ):
        hosts.barrier()
        yield lambda: None


@contextmanager
def _leased_run(
    run: RunDir, bucket: Bucket, hosts: Hosts, refusal: str, keep: bool
) -> Iterator[Callable[[], None]]:
    """Hold the lock of a run in a bucket, and have its small files here; `locked_run_dir`."""
    copy = WorkingCopy(run, bucket)
    with ExitStack() as held:
        held.enter_context(shown_as_url(run))
        if hosts.primary:
            held.enter_context(leased(bucket, refusal))
        hosts.barrier()
        held.enter_context(signals.undone(copy.remove))
        held.callback(copy.remove)
        copy.fetch()
        if not hosts.primary or not keep:
            if keep:
                _check_writable(bucket)
            yield lambda: None
            return
        held.enter_context(copy.published())
        try:
            yield copy.publish
        finally:
            copy.publish()


def _check_writable(bucket: Bucket) -> None:
    """Write as this process will have to, before hours have been trained."""
    name = f".dsjax-{uuid.uuid4().hex}"
    bucket.write(name, b"")
    bucket.remove([name])


@contextmanager
def _removed_if_refused(folders: Sequence[Path], keep: bool) -> Iterator[None]:
    """Remove folders, as far as they are empty, if an error or a signal ends the block.

    Or whatever ends it, unless they are to be kept.
    """

    def remove() -> None:
        with suppress(OSError):  # one that is not empty stays, and so do those above it
            for folder in folders:
                folder.rmdir()

    try:
        with signals.undone(remove):
            yield
    except Exception:
        remove()
        raise
    if not keep:
        remove()


def make_for_all(folder: Place, hosts: Hosts) -> None:
    """Make a folder as process 0; the others wait until they see it. A bucket needs none."""
    if isinstance(folder, Bucket):
        return
    if hosts.primary:
        folder.mkdir(exist_ok=True)
    hosts.barrier()
    _await_folder(folder)


def _await_folder(folder: Path, within: float = 90.0) -> None:
    """Wait for what process 0 has made: NFS remembers for a while that it was not there."""
    deadline = time.monotonic() + within
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"output_dir: got no {str(folder)!r} here {within:g} s after process 0 made it, "
                "expected a folder that all processes share"
            )
        time.sleep(0.1)
