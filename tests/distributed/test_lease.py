# SPDX-License-Identifier: Apache-2.0
"""The lock in a bucket: one holder, whatever ends it, and none that comes back from the dead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import object_store
import pytest
import small_run

from dsjax.buckets import Bucket, retry
from dsjax.distributed import lease
from dsjax.distributed.lock_file import LOCK_FILE
from dsjax.errors import ConfigError

HELD = "output_dir: got it held, expected none"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A folder whose lock goes over soon."""
    object_store.register(tmp_path)
    monkeypatch.setattr(retry, "DELAYS", (0.0,) * 5)
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.05)
    monkeypatch.setattr(lease, "DEAD_AFTER", 1.0)
    return Bucket.open("store://bucket/run", "output_dir")


def of_another_host(folder: Bucket, number: int, renewals: int = 0) -> None:
    """Leave the lock of a process somewhere else."""
    text = json.dumps(["elsewhere", 7, "boot", "token", renewals])
    folder.write(f"{LOCK_FILE}/{number:08d}", text.encode())


def test_it_is_held_and_leaves_nothing(folder: Bucket):
    with lease.leased(folder, HELD):
        holder = lease.holder_in(folder)
        assert holder is not None and holder.pid == os.getpid()
        with pytest.raises(ConfigError, match=f"^{HELD} .store://bucket/run/.* is held by process"):
            lease.leased(folder, HELD).__enter__()
    assert folder.sizes() == {} and lease.holder_in(folder) is None


def test_of_many_at_once_one_holds_it(folder: Bucket):
    inside, most, refused = [], [], []

    def hold() -> None:
        try:
            with lease.leased(folder, HELD):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.1)
                inside.pop()
        except ConfigError:
            refused.append(1)

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) + len(refused) == 8
    assert folder.sizes() == {}


def test_a_holder_that_is_alive_elsewhere_is_seen(folder: Bucket):
    of_another_host(folder, 3)
    renewed = threading.Timer(0.3, of_another_host, (folder, 3, 1))
    renewed.start()
    with pytest.raises(ConfigError, match="is held by process 7 of host elsewhere"):
        lease.leased(folder, HELD).__enter__()
    renewed.join()


def test_a_holder_without_a_sign_of_life_is_followed(folder: Bucket, capsys: pytest.CaptureFixture):
    of_another_host(folder, 3)
    began = time.monotonic()
    with lease.leased(folder, HELD):
        assert time.monotonic() - began > lease.DEAD_AFTER
        assert list(folder.sizes()) == [f"{LOCK_FILE}/00000004"]
    said = capsys.readouterr().err
    assert "waiting for up to 1 s for a sign of its life" in said
    assert "process 7 of host elsewhere is taken for dead" in said


def test_a_holder_that_has_ended_here_is_followed_at_once(folder: Bucket):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder = [lease._Lease.ours().holder.host, ended.pid, lease._place(), "token", 0]
    folder.write(f"{LOCK_FILE}/00000001", json.dumps(holder).encode())
    began = time.monotonic()
    with lease.leased(folder, HELD):
        assert time.monotonic() - began < lease.DEAD_AFTER / 2


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[]", b"null", b"7"])
def test_an_object_that_is_no_lock_is_followed(folder: Bucket, content: bytes):
    folder.write(f"{LOCK_FILE}/00000001", content)
    with lease.leased(folder, HELD):
        assert list(folder.sizes()) == [f"{LOCK_FILE}/00000002"]


def renewals(folder: Bucket) -> int:
    """How often the first holder has given a sign of life."""
    return json.loads(folder.read(f"{LOCK_FILE}/00000001"))[-1]


def test_it_is_renewed_and_the_store_may_be_away(folder: Bucket, capsys: pytest.CaptureFixture):
    with lease.leased(folder, HELD):
        with object_store.disturbed(lambda *_: "refused"):
            time.sleep(0.3)
        first, deadline = renewals(folder), time.monotonic() + 5
        while renewals(folder) < first + 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "warning: output_dir: got OSError: 503" in capsys.readouterr().err
    assert folder.sizes() == {}


def test_an_earlier_process_of_our_own_number_is_gone(folder: Bucket):
    """A container that is started again has the name, the boot and the number of the last one."""
    folder.write(f"{LOCK_FILE}/00000001", lease._Lease.ours().encode())
    began = time.monotonic()
    with lease.leased(folder, HELD):
        assert time.monotonic() - began < lease.DEAD_AFTER / 2


def test_a_process_of_another_container_is_not_looked_for(
    folder: Bucket, monkeypatch: pytest.MonkeyPatch
):
    """It has the host's name, and a number that nobody has here."""
    holder = [lease._Lease.ours().holder.host, 2**22 + 1, f"{lease.boot_id()}/other", "token", 0]
    folder.write(f"{LOCK_FILE}/00000003", json.dumps(holder).encode())
    renewed = threading.Timer(
        0.3, folder.write, (f"{LOCK_FILE}/00000003", json.dumps([*holder[:-1], 1]).encode())
    )
    renewed.start()
    with pytest.raises(ConfigError, match="is held by process 4194305"):
        lease.leased(folder, HELD).__enter__()
    renewed.join()


def test_two_that_meet_a_release_do_not_both_hold_it(
    folder: Bucket, monkeypatch: pytest.MonkeyPatch
):
    """The list was made before the last holder left; another has begun at 1 since."""
    numbers, stale = lease._numbers, [[5]]
    of_another_host(folder, 1)
    monkeypatch.setattr(lease, "_await_end", lambda *_: None)
    monkeypatch.setattr(lease, "_numbers", lambda lock: stale.pop() if stale else numbers(lock))
    with lease.leased(folder, HELD):
        assert list(folder.sizes()) == [f"{LOCK_FILE}/00000002"]


def test_a_store_that_cannot_lock_is_told(
    folder: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    write = object_store.ObjectStore.pipe_file
    monkeypatch.setattr(
        object_store.ObjectStore,
        "pipe_file",
        lambda self, path, value, **_: write(self, path, value),
    )
    with lease.leased(folder, HELD):
        assert lease.holder_in(folder) is not None
    assert "/.dsjax.lock: cannot be locked (this store replaces" in capsys.readouterr().err
    assert folder.sizes() == {}


HOLDS = """
import sys, time
from pathlib import Path
import object_store
from dsjax.buckets import Bucket
from dsjax.distributed import lease
object_store.register(Path(sys.argv[1]))
lease.RENEWED_EVERY, lease.DEAD_AFTER = 0.2, 1.0
folder = Bucket.open("store://bucket/run", "output_dir")
with lease.leased(folder, "output_dir: got it held, expected none"):
    print("held", flush=True)
    time.sleep(60)
"""


def holding(store: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock, and wait until it does."""
    paths = os.pathsep.join(map(str, (small_run.ROOT, small_run.ROOT / "tests")))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_killed_holder_is_followed(folder: Bucket, tmp_path: Path):
    process = holding(tmp_path)
    with pytest.raises(ConfigError, match=f"is held by process {process.pid}"):
        lease.leased(folder, HELD).__enter__()
    process.kill()
    process.communicate()
    with lease.leased(folder, HELD):
        assert list(folder.sizes()) == [f"{LOCK_FILE}/00000002"]


def test_one_that_was_taken_for_dead_ends_when_it_wakes(
    folder: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    process = holding(tmp_path)
    process.send_signal(signal.SIGSTOP)  # a machine that is frozen for a while
    monkeypatch.setattr(lease, "_place", lambda: "another host's")
    with lease.leased(folder, HELD):
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 2 and "Traceback" not in said
        assert "got another holder or none, expected this process" in said
        assert list(folder.sizes()) == [f"{LOCK_FILE}/00000002"]
