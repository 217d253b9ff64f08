# SPDX-License-Identifier: Apache-2.0
"""Objects arrive whole, whatever a store does in between, or the user is told."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import object_store
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsjax.buckets import Bucket, open_place
from dsjax.errors import ConfigError

LARGE = random.Random(0).randbytes((1 << 20) + 7)
"""An object of which the size alone is compared."""


def first(count: int, fault: str, operation: str = "write") -> Callable[[str, str], str]:
    """Give the first requests of a kind this fault."""
    left = [fault] * count
    return lambda what, path: left.pop() if what == operation and left else ""


def test_what_is_written_is_read_listed_and_removed(folder: Bucket):
    assert folder.sizes() == {} and folder.files() == [] and folder.folders() == []
    folder.write("a.txt", b"abc")
    folder.write("in/b.txt", LARGE)
    folder.write("a.txt", b"abcd")
    assert folder.sizes() == {"a.txt": 4, "in/b.txt": len(LARGE)}
    assert (folder.files(), folder.folders()) == (["a.txt"], ["in"])
    assert folder.folder("in").sizes() == {"b.txt": len(LARGE)}
    assert folder.read("a.txt") == b"abcd" and folder.read("a.txt", 1, 3) == b"bc"
    assert folder.holds("in/b.txt") and not folder.holds("in") and not folder.holds("b.txt")
    assert folder.read_if_there("b.txt") is None
    folder.remove(["a.txt", "no.txt"])
    assert folder.files() == []
    with pytest.raises(FileNotFoundError):
        folder.read("a.txt")


def test_files_go_up_and_down(folder: Bucket, tmp_path: Path):
    (tmp_path / "here").write_bytes(LARGE)
    folder.upload(tmp_path / "here", "there")
    folder.download("there", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == LARGE


def test_an_object_is_created_once(folder: Bucket):
    assert folder.create("lock", b"mine")
    assert not folder.create("lock", b"yours")
    assert folder.read("lock") == b"mine"


def test_of_many_who_create_an_object_one_has_it(folder: Bucket):
    ours: list[int] = []

    def create(number: int) -> None:
        if folder.create("lock", str(number).encode()):
            ours.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number).encode() for number in ours] == [folder.read("lock")]


def test_an_object_whose_answer_is_lost_is_ours(folder: Bucket):
    with object_store.disturbed(first(1, "answer lost")):
        assert folder.create("lock", b"mine")


@pytest.mark.parametrize("fault", ["refused", "answer lost", "object lost", "object cut"])
@pytest.mark.parametrize("content", [b"content", LARGE], ids=["small", "large"])
def test_a_write_that_goes_wrong_is_written_again(
    folder: Bucket, fault: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
):
    with object_store.disturbed(first(2, fault)):
        folder.write("a", content)
    assert folder.read("a") == content
    (tmp_path / "file").write_bytes(content)
    with object_store.disturbed(first(2, fault)):
        folder.upload(tmp_path / "file", "b")
    assert folder.read("b") == content
    with object_store.disturbed(first(2, fault)):
        folder.copy_to(folder.folder("in"), "b")
    assert folder.read("in/b") == content
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6 and all("; again in " in line for line in said)
    assert all(line.startswith("store://bucket/run/") for line in said)


@pytest.mark.parametrize("operation", ["read", "list", "look", "remove"])
def test_other_requests_are_made_again(folder: Bucket, operation: str):
    folder.write("a", b"content")
    acts = {
        "read": lambda: folder.read("a"),
        "list": folder.sizes,
        "look": lambda: folder.holds("a"),
        "remove": lambda: folder.remove(["a"]),
    }
    with object_store.disturbed(first(3, "refused", operation)):
        acts[operation]()
    assert folder.holds("a") == (operation != "remove")


def test_a_store_that_never_answers_is_told(folder: Bucket, capsys: pytest.CaptureFixture):
    with object_store.disturbed(lambda *_: "refused"), pytest.raises(ConfigError) as caught:
        folder.write("a", b"content")
    assert str(caught.value) == (
        "output_dir: got OSError: 503 Service Unavailable from store://bucket/run/a, expected it "
        "to be read and written; check the address, the credentials, the permissions and the "
        "network, and run the same command again"
    )
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_a_missing_permission_is_told_at_once(
    folder: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(object_store.ObjectStore, "pipe_file", refuse)
    with pytest.raises(ConfigError, match="^output_dir: got PermissionError: 403 Forbidden from"):
        folder.write("a", b"content")
    assert capsys.readouterr().err == ""


def test_a_bucket_that_is_not_there_is_named(folder: Bucket, monkeypatch: pytest.MonkeyPatch):
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(object_store.ObjectStore, "pipe_file", missing)
    expected = "^output_dir: got 'store://bucket/run', expected a bucket that is there .*; make it"
    with pytest.raises(ConfigError, match=expected):
        folder.write("a", b"content")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://host/run", "expected a directory, a hub id, or a URL of a store"),
        ("nonsense://bucket/run", "expected a URL that fsspec opens"),
    ],
)
def test_a_place_that_cannot_be_reached_is_named(url: str, says: str):
    with pytest.raises(ConfigError, match=f"^export.path: got '{url}', {says}"):
        open_place(url, "export.path")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["", *object_store.FAULTS[:4]]), max_size=12), st.data())
def test_no_faults_leave_other_content(folder: Bucket, faults: list[str], data: st.DataObject):
    """What returns has written; what raises has said so, and left the old object or the new."""
    folder.write("a", b"old")
    content, left = data.draw(st.binary(max_size=9)), list(faults)
    with object_store.disturbed(lambda what, path: left.pop() if left else ""):
        try:
            folder.write("a", content)
        except ConfigError:
            assert len(faults) >= 6
            return
    assert folder.read("a") == content
