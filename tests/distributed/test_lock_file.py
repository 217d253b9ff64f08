# SPDX-License-Identifier: Apache-2.0
"""One process of all hosts holds a lock at a time; who waits or is refused is told why."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsjax.distributed import lock_file
from dsjax.distributed.lock_file import LOCK_FILE, locked
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.training.run_dir import RunDir, read_manifest
from dsjax.training.run_lock import locked_run_dir
from dsjax.weights.folders import atomic_directory, check_empty

ROOT = Path(__file__).parents[2]
HERE = socket.gethostname(), lock_file.boot_id()
HOLDS = """
import fcntl, sys, time
from pathlib import Path
if sys.argv[2] == "byte ranges":  # what NFS makes of it
    fcntl.flock = fcntl.lockf
from dsjax.distributed.lock_file import locked
with locked(Path(sys.argv[1]), "it is held"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(file: Path, how: str = "whole") -> Iterator[subprocess.Popen[str]]:
    """Hold a file's lock by another process until the block, or the process's stdin, ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(file), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@contextmanager
def seconds_at_most(most: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < most


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_that_lives_here_is_not_waited_for(tmp_path: Path, stopped: bool):
    file = tmp_path / LOCK_FILE
    with held_elsewhere(file) as process:
        if stopped:
            process.send_signal(signal.SIGSTOP)
        before = file.read_bytes(), file.stat().st_mtime_ns
        who = f"process {process.pid} of host {socket.gethostname()}"
        refusal = rf"^no \({file} is held by {who}\)$"
        with seconds_at_most(20), pytest.raises(ConfigError, match=refusal), locked(file, "no"):
            pass
        assert (file.read_bytes(), file.stat().st_mtime_ns) == before
        process.kill()
        process.wait()
    assert file.exists()  # which holds nothing
    with locked(file, "no"):
        assert file.read_text() == f"{HERE[0]} {os.getpid()} {HERE[1]}\n"
    assert not file.exists()


@pytest.mark.parametrize("how", ["whole", "byte ranges"])
def test_a_lock_excludes_where_it_is_one_of_byte_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    """As such Linux passes a flock on to an NFS server; a folder, or a file that is open for
    reading only, can have none."""
    if how == "byte ranges":
        monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    for place, claim in claims(tmp_path).items():
        with held_elsewhere(place, how), pytest.raises(ConfigError, match="is held by process"):
            with claim():
                pass


def claims(folder: Path) -> dict[Path, Callable]:
    """What is locked, by the file that is locked for it."""
    (folder / "run").mkdir(exist_ok=True)
    return {
        folder / "run" / LOCK_FILE: lambda: locked_run_dir(RunDir(folder / "run"), Hosts()),
        folder / "run" / ".export.lock": lambda: atomic_directory(folder / "run" / "export"),
    }


@pytest.mark.parametrize(
    "text", ["elsewhere 4711 x\n", "", "half", "\xff\xfe", "here -1 x\n", "a b c d", "here 1"]
)
def test_another_host_is_waited_for_and_then_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
):
    monkeypatch.setattr(lock_file, "PATIENCE", 0.4)
    file = tmp_path / LOCK_FILE
    with held_elsewhere(file):
        file.write_bytes(text.encode("latin1"))
        known = text.startswith("elsewhere")
        who = "process 4711 of host elsewhere" if known else "a process that it does not name"
        with pytest.raises(ConfigError) as error, locked(file, "no"):
            pass
        assert file.read_bytes() == text.encode("latin1")
    assert str(error.value) == (
        f"no ({file} is held by {who}, and still was after 0.4 s; if that has ended for certain, "
        "remove this file)"
    )
    assert capsys.readouterr().err == (
        f"{file} is held by {who}; waiting for up to 0.4 s, since a file server frees the lock "
        "late where a host has crashed\n"
    )


@pytest.mark.parametrize("killed", [True, False])
def test_a_lock_that_is_freed_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
):
    """Who held it leaves the file, or removes it: what is locked then is the file that is there."""
    monkeypatch.setattr(lock_file, "PATIENCE", 60.0)
    monkeypatch.setattr(lock_file, "_POLL", 0.05)
    file = tmp_path / LOCK_FILE
    with held_elsewhere(file) as process:
        assert process.stdin is not None
        file.write_text("elsewhere 4711 x\n")
        end = process.kill if killed else process.stdin.close
        threading.Timer(0.3, end).start()
        with seconds_at_most(30), locked(file, "no"):
            assert file.read_text() == f"{HERE[0]} {os.getpid()} {HERE[1]}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_the_same_name_and_number_elsewhere_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A pod that comes back on another machine has the name and number of the one that is gone."""
    monkeypatch.setattr(lock_file, "PATIENCE", 0.4)
    file = tmp_path / LOCK_FILE
    with held_elsewhere(file):
        file.write_text(f"{HERE[0]} {os.getpid()} another-boot\n")
        with pytest.raises(ConfigError, match="and still was after 0.4 s"), locked(file, "no"):
            pass


def test_who_left_it_on_another_host_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Some mounted buckets keep a lock on the host that took it: the name is all that is seen."""
    file = tmp_path / LOCK_FILE
    file.write_text("elsewhere 4711 x\n")
    with locked(file, "no"):
        pass
    told = f"{file} was left by process 4711 of host elsewhere: it was killed, or its lock is not"
    assert capsys.readouterr().err.startswith(told)
    file.write_text(f"{HERE[0]} {2**22 + 1} {HERE[1]}\n")  # above the largest there is
    with locked(file, "no"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock_file, "_without_locks", set())
    for claim in claims(tmp_path).values():
        with claim():
            pass
    assert capsys.readouterr().err == (
        f"{tmp_path}/run: cannot be locked ({os.strerror(number)}); let no second process write "
        "there\n"
    )


def test_a_failure_of_the_lock_is_the_system_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError) as error, locked(tmp_path / LOCK_FILE, "no"):
        pass
    assert error.value.filename == f"{tmp_path}/{LOCK_FILE}"


@pytest.mark.parametrize("folder", [True, False])
def test_a_link_or_folder_of_that_name_is_refused(tmp_path: Path, folder: bool):
    file = tmp_path / LOCK_FILE
    file.mkdir() if folder else file.symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(ConfigError, match=r"got a link or a folder, expected a file that is lock"):
        with locked(file, "no"):
            pass
    assert not (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("gone", [FileExistsError, FileNotFoundError], ids=["it", "above it"])
def test_a_folder_that_another_removes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: type[OSError]
):
    """It stood when it was to be made and was gone when looked at, or the one above it was."""
    folder, make, failures = tmp_path / "above" / "run", os.mkdir, [gone, gone]

    def above(folder: Path) -> bool:
        return gone is FileExistsError or folder.parent.exists()

    def removed_meanwhile(path: Path, mode: int = 0o777) -> None:
        if failures and Path(path) == folder and above(folder):
            raise failures.pop()
        make(path, mode)

    monkeypatch.setattr(os, "mkdir", removed_meanwhile)
    with locked(folder / LOCK_FILE, "no"):
        assert (folder / LOCK_FILE).exists() and not failures


def test_a_file_in_the_place_of_the_folder_is_the_system_s(tmp_path: Path):
    (tmp_path / "run").write_text("a thesis")
    with pytest.raises(FileExistsError), locked(tmp_path / "run" / LOCK_FILE, "no"):
        pass
    assert (tmp_path / "run").read_text() == "a thesis"


def test_never_do_two_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file comes and goes, and its folder with it, while others open it."""
    run = tmp_path / "deep" / "run"
    inside: list[int] = []
    monkeypatch.setattr(lock_file, "_POLL", 0.0)

    def enter(worker: int) -> int:
        for tries in range(100_000):
            try:
                with locked_run_dir(RunDir(run), Hosts()):
                    inside.append(worker)
                    assert inside == [worker]
                    time.sleep(0.0005)
                    assert inside == [worker] and (run / LOCK_FILE).exists()
                    inside.remove(worker)
                    raise InterruptedError  # a refused run, which removes its folder
            except InterruptedError:
                return tries
            except ConfigError as error:
                assert "in which another process is training" in str(error)
        raise AssertionError("never came in")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(40)))
    assert list(tmp_path.rglob(LOCK_FILE)) == []


def test_what_a_kill_leaves_is_nobody_s_file(tmp_path: Path):
    (tmp_path / LOCK_FILE).write_text("elsewhere 4711 x\n")
    check_empty(tmp_path)
    with atomic_directory(tmp_path, check=lambda: check_empty(tmp_path)) as folder:
        (folder / "a").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and read_manifest(tmp_path) is None


@pytest.mark.parametrize("ends", ["well", "by an error"])
def test_a_run_folder_keeps_no_lock(tmp_path: Path, ends: str):
    run = tmp_path / "above" / "run"
    try:
        with locked_run_dir(RunDir(run), Hosts()):
            assert [path.name for path in run.iterdir()] == [LOCK_FILE]
            (run / "checkpoints").mkdir()
            if ends != "well":
                raise RuntimeError(ends)
    except RuntimeError:
        assert not (tmp_path / "above").exists()
    else:
        assert [path.name for path in run.iterdir()] == ["checkpoints"]


def test_who_holds_a_lock_can_be_read(tmp_path: Path):
    file = tmp_path / LOCK_FILE
    assert lock_file.holder_of(file) is None
    with held_elsewhere(file) as process:
        holder = lock_file.holder_of(file)
        assert holder is not None and holder.pid == process.pid and holder.lives_here
    holder = lock_file.holder_of(file)  # it was killed, and left the file
    assert holder is not None and holder.is_of_here and not holder.lives_here
    file.write_text("no process")
    assert lock_file.holder_of(file) is None
