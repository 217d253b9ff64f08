# SPDX-License-Identifier: Apache-2.0
"""A folder in a bucket: the old one until the new one is proven, and never half of either."""

from collections.abc import Callable
from pathlib import Path

import object_store
import pytest

from dsjax.buckets import Bucket, retry
from dsjax.errors import ConfigError
from dsjax.weights.bucket_folder import Last, bucket_directory
from dsjax.weights.folders import content

LAST = Last("manifest.json", b"begun")
OLD = {"config.json": b"old", "gone.bin": b"old", "weights.bin": b"old", "manifest.json": b"old"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A folder of a bucket that holds something."""
    object_store.register(tmp_path / "store")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(retry, "DELAYS", (0.0,) * 5)
    folder = Bucket.open("store://bucket/out", "export.path")
    for name, data in OLD.items():
        folder.write(name, data)
    return folder


def write(folder: Bucket, proven: Callable[[], None] = lambda: None) -> None:
    with bucket_directory(folder, "export.path", LAST, True, lambda: None) as draft:
        (draft.directory / "weights.bin").write_bytes(b"new")
        draft.send("weights.bin")
        assert not (draft.directory / "weights.bin").exists()
        (draft.directory / "config.json").write_bytes(b"early")
        assert draft.share().startswith(str(folder))
        (draft.directory / "config.json").write_bytes(b"new")
        proven()
        (draft.directory / "manifest.json").write_bytes(b"new")


def contents(folder: Bucket) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.sizes()}


def test_the_new_takes_the_place_of_the_old(folder: Bucket, tmp_path: Path):
    write(folder)
    assert contents(folder) == dict.fromkeys(
        ["config.json", "manifest.json", "weights.bin"], b"new"
    )
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_is_refused_leaves_the_old(folder: Bucket, tmp_path: Path):
    def refuse() -> None:
        raise ConfigError("export.min_kept: got too little")

    with pytest.raises(ConfigError, match="too little"):
        write(folder, refuse)
    assert contents(folder) == OLD
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_must_not_be_replaced_is_not_touched(folder: Bucket):
    def refuse() -> None:
        raise ConfigError("export.path: got somebody's files")

    with pytest.raises(ConfigError, match="somebody's"):
        bucket_directory(folder, "export.path", LAST, True, refuse).__enter__()
    assert contents(folder) == OLD


class KilledError(BaseException):
    """Stands for SIGKILL: nothing is cleared up by what catches errors."""


def test_a_kill_leaves_the_old_or_none_and_the_next_attempt_goes_on(folder: Bucket):
    """At every write and removal: who opens `config.json` finds all that belongs to it."""
    changes, last = 0, False
    while not last:
        left = [changes]

        def stop(operation: str, path: str, left: list[int] = left) -> str:
            if operation in ("write", "remove") and ".dsjax.lock" not in path:
                if not left[0]:
                    raise KilledError
                left[0] -= 1
            return ""

        for name, data in OLD.items():
            folder.write(name, data)
        try:
            with object_store.disturbed(stop):
                write(folder)
            last = True
        except KilledError:
            found = {name: folder.read(name) for name in content(folder)}
            if "config.json" in found:
                whole = set(found.values()) - {LAST.begun}
                assert whole in ({b"old"}, {b"new"}), (changes, found)
                assert found["manifest.json"] == LAST.begun or len(set(found.values())) == 1
        write(folder)
        assert set(contents(folder).values()) == {b"new"}
        folder.remove(list(folder.sizes()))
        changes += 1
    assert changes > 8
