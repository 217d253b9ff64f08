# SPDX-License-Identifier: Apache-2.0
"""Folders behind a URL: what is listed, what is read and what is said when neither works."""

import gc
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import memory_bucket
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from memory_bucket import Bucket

from dsjax.config.paths import is_url
from dsjax.errors import ConfigError
from dsjax.weights import storage


@pytest.fixture
def store() -> Iterator[Bucket]:
    """An empty bucket."""
    with memory_bucket.opened() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, and one in a folder."""
    (tmp_path / "inner").mkdir()
    for name, text in (("b.txt", "BÄ"), ("a.txt", "0123456789"), ("inner/c.txt", "C")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def refusal(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        storage.open_folder(path, "model.path")
    return str(caught.value)


@pytest.mark.parametrize("kind", ["local", "memory", "file"])
def test_the_same_files_wherever_they_lie(kind: str, folder: Path, store: Bucket) -> None:
    url = store.upload(folder)
    place = {"local": str(folder), "memory": f"{url}/", "file": f"file://{folder}"}[kind]
    found = storage.open_folder(place, "model.path")
    assert list(found.files) == ["a.txt", "b.txt"]
    assert (found.place, found.is_remote) == (place.rstrip("/"), kind != "local")
    a, b = found.files.values()
    assert [str(a), a.name] == [f"{place.rstrip('/')}/a.txt", "a.txt"]
    assert (storage.size_of(a), storage.read_text(b)) == (10, "BÄ")
    part = storage.read_at(a, 3, 4)
    assert part.tobytes() == b"3456" and part.flags.writeable
    assert storage.read_at(a, 10, 0).tobytes() == b""


def test_only_the_range_is_read(folder: Path, store: Bucket) -> None:
    found = storage.open_folder(store.upload(folder), "model.path")
    assert store.reads == []
    storage.read_at(found.files["a.txt"], 3, 4)
    storage.read_at(found.files["a.txt"], 3, 0)
    assert store.reads == [("a.txt", 3, 7)]


def test_a_store_without_folders_may_hold_an_object_of_the_folders_name(
    store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = [
        {"name": "/bucket/model/", "size": 0, "type": "file"},
        {"name": "/bucket/model/a.txt", "size": 1, "type": "file"},
    ]
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda system, path, detail: listing)
    found = storage.open_folder("memory://bucket/model", "model.path")
    assert list(found.files) == ["a.txt"]


def test_copies_go_with_their_folder(folder: Path, store: Bucket) -> None:
    found = storage.open_folder(store.upload(folder), "model.path")
    copy = storage.copied(found, ["b.txt"])
    assert [file.name for file in copy.iterdir()] == ["b.txt"]
    assert (copy / "b.txt").read_text(encoding="utf-8") == "BÄ"
    del found
    gc.collect()
    assert not copy.exists()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gs://bucket/a", True),
        ("s3://bucket", True),
        ("hf://deepseek-ai/DeepSeek-R1@main", True),
        ("deepseek-ai/DeepSeek-R1", False),
        ("/a/b", False),
        ("gs:/bucket", False),
        ("gs://", False),
        ("C://a", False),
    ],
)
def test_what_is_a_url(path: str, expected: bool) -> None:
    assert is_url(path) is expected


def test_a_folder_that_is_not_there(store: Bucket) -> None:
    assert refusal("memory://bucket/none") == (
        "model.path: got 'memory://bucket/none', expected a folder that can be listed "
        "(FileNotFoundError: /bucket/none); check the address, the credentials and the network"
    )


def test_a_folder_that_may_not_be_listed(store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(system: MemoryFileSystem, path: str, detail: bool) -> None:
        raise PermissionError("no storage.objects.list\n for you")

    monkeypatch.setattr(MemoryFileSystem, "ls", forbidden)
    assert "(PermissionError: no storage.objects.list for you); check" in refusal("memory://b/x")


def test_a_file_in_place_of_a_folder(folder: Path, store: Bucket) -> None:
    url = store.upload(folder)
    assert refusal(f"{url}/a.txt") == (
        f"model.path: got the file '{url}/a.txt', expected the folder that holds it; give '{url}'"
    )


def test_a_page_of_the_hub() -> None:
    message = refusal("https://huggingface.co/deepseek-ai/DeepSeek-R1")
    assert message.startswith("model.path: got 'https://huggingface.co/deepseek-ai/DeepSeek-R1', ")
    assert message.endswith("a page of the hub is named organization/name")


def test_an_unknown_protocol() -> None:
    assert refusal("gsx://bucket/a").startswith(
        "model.path: got 'gsx://bucket/a', expected a URL that fsspec opens, such as gs://, s3:// "
        "or hf:// (ValueError: Protocol not known: gsx"
    )


@pytest.mark.parametrize(
    ("url", "library", "fix"),
    [
        ("gs://bucket/a", "gcsfs", "; pip install gcsfs"),
        ("s3://bucket/a", "s3fs", "; pip install s3fs"),
        ("abfs://bucket/a", "adlfs", "; ImportError: Install adlfs"),
    ],
)
def test_a_library_that_is_not_installed(
    url: str, library: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    message = refusal(url)
    protocol = url.partition("://")[0]
    assert message.startswith(
        f"model.path: got {url!r}, expected the library that reads {protocol}://, which is not "
        "installed"
    )
    assert fix in message


def test_the_hub_when_it_is_out_of_reach() -> None:
    message = refusal("hf://nobody/nothing")  # tests run with HF_HUB_OFFLINE
    assert message.startswith(
        "model.path: got 'hf://nobody/nothing', expected a folder that can be"
    )


def test_a_read_that_fails(folder: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    file = storage.open_folder(store.upload(folder), "model.path").files["a.txt"]

    def forbidden(system: MemoryFileSystem, path: str, **words) -> bytes:
        raise PermissionError("no storage.objects.get")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", forbidden)
    with pytest.raises(ConfigError) as caught:
        storage.read_at(file, 2, 5)
    assert str(caught.value) == (
        "memory://bucket/model/a.txt: got PermissionError: no storage.objects.get, expected its "
        "bytes 2 to 7; check the network and the permission to read, and run again"
    )


def test_a_file_that_shrinks_while_in_use(folder: Path, store: Bucket) -> None:
    file = storage.open_folder(store.upload(folder), "model.path").files["a.txt"]
    MemoryFileSystem().pipe_file("/bucket/model/a.txt", b"0123")
    with pytest.raises(OSError, match="a.txt ended at byte 4: it changed while in use"):
        storage.read_at(file, 2, 5)


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_reads_keep_their_order_and_their_number(at_a_time: int) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def read(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01 if number % 2 else 0.03)
        with lock:
            running -= 1
        return number

    reads = (partial(read, number) for number in range(12))
    assert list(storage.in_order(reads, at_a_time)) == list(range(12))
    assert most == at_a_time


def test_a_failing_read_stops_those_after_it() -> None:
    done = []

    def read(number: int) -> None:
        if number == 2:
            raise ConfigError("no")
        done.append(number)

    with pytest.raises(ConfigError, match="no"):
        list(storage.in_order((partial(read, number) for number in range(1000)), 4))
    assert {0, 1} <= set(done) and len(done) < 10
