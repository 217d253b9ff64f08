# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a bucket: what comes back is what was saved, to the bit, or is refused by name."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import object_store
import pytest
from checkpoint_states import EVERY, abstract, assert_same, make_state, matrix_shardings

from dsjax.buckets import Bucket, retry
from dsjax.config import CheckpointSection
from dsjax.distributed import arrays
from dsjax.errors import ConfigError
from dsjax.training import bucket_store
from dsjax.training.checkpoint import Checkpointer, RemovedError, from_newest

URL = "store://bucket/run/checkpoints"
Open = Callable[..., Checkpointer]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty folder of a bucket."""
    object_store.register(tmp_path)
    monkeypatch.setattr(retry, "DELAYS", (0.0,) * 5)
    return Bucket.open(URL, "output_dir")


@pytest.fixture
def opened(folder: Bucket) -> Iterator[Open]:
    """Open Checkpointers of the folder; close them all at the end."""
    made = []

    def open_one(section: CheckpointSection = EVERY, **options: bool) -> Checkpointer:
        made.append(Checkpointer(folder, section, **options))
        return made[-1]

    yield open_one
    for checkpointer in made:
        checkpointer.close()


def save(checkpointer: Checkpointer, *steps: int) -> Checkpointer:
    for step in steps:
        checkpointer.save(step, make_state(step), {"row": step})
    checkpointer.wait()
    return checkpointer


def test_state_and_meta_come_back(opened: Open):
    save(opened(), 3, 7)
    again = opened(read_only=True)
    assert again.latest() == 7 and again.meta(7) == {"row": 7}
    for step in (7, 3):
        assert_same(again.restore(step, abstract(make_state(0))), make_state(step))
    wanted = {"trainable": abstract(make_state(0).trainable)}
    assert_same(again.restore(3, wanted, partial=True), {"trainable": make_state(3).trainable})


def test_a_folder_without_any_has_none(opened: Open, folder: Bucket):
    assert opened(read_only=True).latest() is None
    assert folder.sizes() == {}


@pytest.mark.parametrize("piece_bytes", [arrays.PIECE_BYTES, 100])
def test_restores_on_another_mesh(
    opened: Open, monkeypatch: pytest.MonkeyPatch, folder: Bucket, piece_bytes: int
):
    """Also where one array lies in many objects, and where an array is empty or a number."""
    monkeypatch.setattr(arrays, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(bucket_store, "PIECE_BYTES", piece_bytes)
    value = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    layouts = matrix_shardings()
    checkpointer = opened()
    for step, source in enumerate(layouts):
        state = {"w": jax.device_put(value, source), "none": jax.numpy.zeros((0, 3))}
        checkpointer.save(step, state, {}, force=True)
        checkpointer.wait()
        for target in layouts:
            read = checkpointer.restore(
                step, {**abstract(state), **abstract({"w": state["w"]}, target)}
            )
            assert read["w"].sharding.is_equivalent_to(target, 2)
            np.testing.assert_array_equal(np.asarray(read["w"]), value)
            assert read["none"].shape == (0, 3)
    objects = [name for name in folder.folder("0/0").sizes() if name.isdecimal()]
    assert (len(objects) > 4) == (piece_bytes == 100)


def test_the_limit_removes_the_oldest(opened: Open, folder: Bucket):
    save(opened(CheckpointSection(save_steps=1, save_total_limit=2)), 1, 2, 3)
    assert folder.folders() == ["2", "3"]
    assert opened().latest() == 3


def test_a_step_is_saved_once(opened: Open):
    ours, theirs = opened(), opened()
    save(theirs, 3)
    with pytest.raises(ConfigError, match=f"^{URL}/3: got a checkpoint of step 3 that is there"):
        ours.save(3, make_state(8), {})
    assert_same(theirs.restore(3, abstract(make_state(0))), make_state(3))


def test_what_is_not_complete_is_announced_and_removed(
    opened: Open, folder: Bucket, capsys: pytest.CaptureFixture
):
    """Killed between any two writes: the last object makes a checkpoint of the others."""
    save(opened(), 3, 7)
    folder.remove(["7/record.json"])
    assert opened(read_only=True).latest() == 3
    assert capsys.readouterr().err == "" and "7" in folder.folders()
    assert opened().latest() == 3
    said = capsys.readouterr().err
    assert said == f"{URL}/7: an unfinished checkpoint, not used and removed\n"
    assert folder.folders() == ["3"]
    save(opened(), 7)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/d/abc", "photo.jpg"])
@pytest.mark.parametrize("read_only", [False, True])
def test_others_files_are_refused_and_stay(
    opened: Open, folder: Bucket, name: str, read_only: bool
):
    """Among them Orbax's checkpoints, of a run that was trained on a mounted bucket."""
    folder.write(f"1000/{name}", b"somebody's")
    with pytest.raises(ConfigError, match=f"^output_dir: got {URL}/1000/{name}, expected a run"):
        opened(read_only=read_only)
    assert folder.read(f"1000/{name}") == b"somebody's"


def test_a_run_that_was_copied_to_a_disk_goes_on_there(opened: Open, tmp_path: Path):
    save(opened(), 3)
    here = tmp_path / "bucket" / "run" / "checkpoints"  # where this store keeps its objects
    for step in (3, 7):
        checkpointer = Checkpointer(here, EVERY)
        assert checkpointer.latest() == 3
        assert_same(checkpointer.restore(3, abstract(make_state(0))), make_state(3))
        if step == 7:
            save(checkpointer, 7)
        checkpointer.close()
    assert (here / "7" / "record.json").is_file()


@pytest.mark.parametrize("fault", ["refused", "answer lost", "object lost", "object cut"])
def test_a_store_that_fails_now_and_then_keeps_them_whole(opened: Open, fault: str):
    chance = random.Random(0)
    with object_store.disturbed(lambda what, path: fault if chance.random() < 0.3 else ""):
        save(opened(), 3, 7)
    checkpointer = opened()
    for step in (3, 7):
        assert_same(checkpointer.restore(step, abstract(make_state(0))), make_state(step))


def test_a_store_that_fails_for_good_is_told_by_the_next_call(opened: Open, folder: Bucket):
    checkpointer = save(opened(), 3)
    with object_store.disturbed(lambda what, path: "refused" if what == "write" else ""):
        checkpointer.save(7, make_state(7), {})
        with pytest.raises(ConfigError, match="^output_dir: got OSError: 503 .* from store://"):
            checkpointer.wait()
    assert opened().latest() == 3


def spoil(folder: Bucket, name: str, how: str) -> None:
    """Damage one object."""
    content = folder.read(name)
    if how == "removed":
        folder.remove([name])
    elif how == "cut":
        folder.write(name, content[:-1])
    else:
        spot = random.Random(name).randrange(len(content))
        changed = bytes([content[spot] ^ 4])
        folder.write(name, content[:spot] + changed + content[spot + 1 :])


@pytest.mark.parametrize("how", ["removed", "cut", "flipped"])
@pytest.mark.parametrize("name", ["0/0", "record.json"])
def test_damage_is_refused_by_name(opened: Open, folder: Bucket, name: str, how: str):
    save(opened(), 3, 7)
    reader = opened(read_only=True)
    spoil(folder, f"7/{name}", how)
    with pytest.raises(ConfigError) as caught:
        reader.restore(7, abstract(make_state(0)))
    assert str(caught.value).startswith(f"{URL}/7: got a damaged checkpoint (")
    assert str(caught.value).endswith("; delete this folder to continue from step 3")
    assert_same(reader.restore(3, abstract(make_state(0))), make_state(3))


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"pieces": 7}', '{"pieces": [[1]]}'])
def test_a_record_of_another_form_is_refused(opened: Open, folder: Bucket, content: str):
    checkpointer = save(opened(), 3)
    folder.write("3/record.json", content.encode())
    with pytest.raises(ConfigError, match="got a damaged checkpoint"):
        checkpointer.restore(3, abstract(make_state(0)))


def test_pieces_that_do_not_cover_an_array_are_refused(opened: Open, folder: Bucket):
    checkpointer = save(opened(), 3)
    record = json.loads(folder.read("3/record.json"))
    del record["pieces"][0]
    folder.write("3/record.json", json.dumps(record).encode())
    with pytest.raises(ConfigError, match=r"damaged checkpoint \(ValueError: 0 of \d+ numbers"):
        checkpointer.restore(3, abstract(make_state(0)))


def test_a_checkpoint_that_goes_away_is_not_called_damaged(
    opened: Open, capsys: pytest.CaptureFixture
):
    writer = save(opened(CheckpointSection(save_steps=1, save_total_limit=1)), 1)

    def read(alive: bool) -> int:
        reader = opened(read_only=True)
        step = reader.latest()
        assert step is not None
        if alive:
            save(writer, step + 1)
        assert_same(reader.restore(step, abstract(make_state(0))), make_state(step))
        return step

    lives = iter([True, False])
    assert from_newest(lambda: read(next(lives))) == 2
    assert f"{URL}/1: got a checkpoint that was removed" in capsys.readouterr().err
    with pytest.raises(RemovedError):
        from_newest(lambda: read(True))


def test_process_0_completes_it_when_all_parts_are_there(
    folder: Bucket, monkeypatch: pytest.MonkeyPatch
):
    """Of two processes each writes what it holds; here both hold all, so pieces lie twice."""
    stores = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        stores.append(bucket_store.BucketStore(folder, None))
    leaves, record = {"w": jax.numpy.arange(6.0)}, {"record": {}, "digest": ""}
    stores[0].save(3, leaves, record)
    other = bucket_store.BucketStore(folder, None, read_only=True)
    assert other.steps() == [] and stores[0]._saving is not None
    stores[1].save(3, leaves, record)
    for store in stores:
        store.close()
        assert store.steps() == [3]
    assert bucket_store.BucketStore(folder, None, read_only=True).steps() == [3]


def test_a_part_that_never_comes_is_told(folder: Bucket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(bucket_store, "PATIENCE", 0.2)
    store = bucket_store.BucketStore(folder, None)
    store.save(3, {"w": jax.numpy.arange(6.0)}, {})
    with pytest.raises(ConfigError, match=r"/3: got no part of processes \[1, 2\] in 0.2 s"):
        store.close()
