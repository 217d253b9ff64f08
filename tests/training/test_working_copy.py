# SPDX-License-Identifier: Apache-2.0
"""The small files of a run in a bucket: what is fetched is whole before any of it is sent."""

import threading
from pathlib import Path

import object_store
import pytest

from dsjax.buckets import Bucket
from dsjax.training.run_dir import RunDir
from dsjax.training.working_copy import WorkingCopy


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run in a bucket, with its working copy in a folder of the test's."""
    object_store.register(tmp_path / "store")
    return RunDir(tmp_path / "copy", None, "store://bucket/run")


def test_what_is_half_fetched_is_not_sent(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """The lock's thread publishes every few seconds, from before the files are here."""
    bucket = run.bucket
    assert bucket is not None
    bucket.write("metrics.jsonl", b"0123456789")
    copy, halfway = WorkingCopy(run, bucket), threading.Event()
    publishing = threading.Thread(target=lambda: (halfway.wait(), copy.publish()))

    def by_halves(bucket: Bucket, name: str, file: Path) -> None:
        file.write_bytes(b"01234")
        halfway.set()
        publishing.join(0.5)
        file.write_bytes(bucket.read(name))

    monkeypatch.setattr(Bucket, "download", by_halves)
    publishing.start()
    copy.fetch()
    publishing.join()
    assert bucket.read("metrics.jsonl") == b"0123456789"


def test_what_others_try_to_write_is_not_fetched(run: RunDir):
    """It is gone again at once, before it can be read."""
    bucket = run.bucket
    assert bucket is not None
    bucket.write("config.yaml", b"")
    bucket.write(".dsjax-0", b"")

    def gone(operation: str, path: str) -> str:
        if operation == "read" and ".dsjax-0" in path:
            raise FileNotFoundError(path)
        return ""

    with object_store.disturbed(gone):
        WorkingCopy(run, bucket).fetch()
    assert [file.name for file in run.path.iterdir()] == ["config.yaml"]
