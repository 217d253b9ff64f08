# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints: refused by name, or read as they were saved; never as other numbers."""

import json
import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_states import EVERY, abstract, assert_same, make_state, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from spoilt import spoilt

from dsjax.config import CheckpointSection
from dsjax.errors import ConfigError
from dsjax.training import orbax_store
from dsjax.training.checkpoint import Checkpointer, RemovedError, from_newest


def truncate(folder):
    for path in (folder / "state").glob("**/d/*"):
        path.write_bytes(path.read_bytes()[:20])


DAMAGE = {
    "truncated data": truncate,
    "no data": lambda folder: shutil.rmtree(folder / "state" / "d"),
    "no manifest": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "broken manifest": lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b"junk"),
    "no metadata": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "broken metadata": lambda folder: (folder / "state" / "_METADATA").write_text("{"),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "nothing": lambda folder: [shutil.rmtree(p) for p in folder.iterdir() if p.is_dir()],
}


def test_a_checkpoint_that_goes_away_is_not_called_damaged(open_in, capsys):
    """The limit of a run that is alive removes it; then the newest is read, once."""
    writer = open_in(CheckpointSection(save_steps=1, save_total_limit=1))
    writer.save(1, make_state(1), {"place": 1})
    writer.wait()

    def read_while(alive, before):
        reader = open_in(read_only=True)
        step = reader.latest()
        meta = reader.meta(step) if before == "restore" else {}
        if alive:
            writer.save(step + 1, make_state(step + 1), {"place": step + 1})
            writer.wait()
        return step, meta or reader.meta(step), reader.restore(step, abstract(make_state(0)))

    for before in ("meta", "restore"):
        lives = iter([True, False])
        step, meta, state = from_newest(lambda: read_while(next(lives), before))  # noqa: B023
        assert meta == {"place": step}
        assert_same(state, make_state(step))
        said = capsys.readouterr().err
        assert f"{writer.place(step - 1)}: got a checkpoint that was removed" in said
        assert said.endswith("; the newest is read instead\n") and "damaged" not in said
    for before in ("meta", "restore"):
        with pytest.raises(RemovedError, match="was removed while it was read, expected"):
            from_newest(lambda: read_while(True, before))  # noqa: B023


def test_a_checkpoint_that_is_half_removed_is_not_called_damaged(open_in, tmp_path):
    """It is removed file by file, while a newer one is there; without one it is damaged."""
    writer = open_in()
    for step in (1, 2):
        writer.save(step, make_state(step), {"place": step})
        writer.wait()
    newer = shutil.move(tmp_path / "checkpoints" / "2", tmp_path / "2")
    one = tmp_path / "checkpoints" / "1"
    files = sorted(path for path in one.rglob("*") if path.is_file())
    refused = 0
    for alive in (True, False):
        for file in files:
            reader, content = open_in(read_only=True), file.read_bytes()
            assert reader.latest() == 1
            if alive:
                shutil.copytree(newer, one.with_name("2"))
            file.unlink()
            try:
                assert_same(reader.restore(1, abstract(make_state(0))), make_state(1))
            except ConfigError as error:
                assert isinstance(error, RemovedError) == alive, file  # noqa: PT017
                assert ("was removed" in str(error)) == alive, file  # noqa: PT017
                refused += 1
            file.write_bytes(content)
            shutil.rmtree(one.with_name("2"), ignore_errors=True)
    assert refused > 4


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_refused_by_name(open_in, tmp_path, damage):
    saved(open_in, 3, 7).close()
    folder = tmp_path / "checkpoints" / "7"
    DAMAGE[damage](folder)
    checkpointer = open_in()
    assert checkpointer.latest() == 7
    with pytest.raises(ConfigError) as caught:
        checkpointer.restore(7, abstract(make_state(0)))
    assert f"{folder}: got a damaged checkpoint (" in str(caught.value)
    assert str(caught.value).endswith("; delete this folder to continue from step 3")
    shutil.rmtree(folder)
    assert_same(open_in().restore(3, abstract(make_state(0))), make_state(3))


def flip_a_bit(folder, rng):
    """Turn one bit over, anywhere in the folder: each file is as likely as each byte."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    file = rng.choice([rng.choice(files), max(files, key=lambda path: path.stat().st_size)])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def restored_in_spite_of_flips(folder, flips, seed):
    """Flip a bit in each of many copies of a checkpoint; return how many were restored right.

    The others must be refused by name. What is restored must be what was saved, to the bit.
    """
    rng, right = random.Random(seed), 0
    meta = {"position": {"epoch": 0, "row": 3}, "meter": {"run": {"loss": 2.25}}}
    first = Checkpointer(folder / "whole", EVERY)
    for step in (3, 7):
        first.save(step, make_state(step, width=64), meta)
    first.close()
    for number in range(flips):
        copy = shutil.copytree(folder / "whole", folder / f"copy{number}")
        flip_a_bit(copy / "7", rng)
        again = Checkpointer(copy, EVERY)
        try:
            assert again.meta(again.latest()) == meta
            assert_same(again.restore(7, abstract(make_state(0, 64))), make_state(7, 64))
            right += 1
        except ConfigError as error:
            assert f"{copy / '7'}: got a damaged checkpoint (" in str(error)  # noqa: PT017
            assert str(error).endswith("delete this folder to continue from step 3")  # noqa: PT017
        again.close()
        shutil.rmtree(copy)
    return right


def test_no_flipped_bit_is_restored_as_another_number(tmp_path):
    assert 0 < restored_in_spite_of_flips(tmp_path, 30, seed=0) < 30


@pytest.mark.slow
def test_none_of_many_flipped_bits_is_restored_as_another_number(tmp_path):
    assert 0 < restored_in_spite_of_flips(tmp_path, 300, seed=1) < 300


def test_a_damaged_leaf_is_named(open_in, tmp_path):
    """Whole arrays of another run, each of them sound: only the record knows."""
    saved(open_in, 7).close()
    other = Checkpointer(tmp_path / "other", EVERY)
    state = make_state(7)
    moved = {**state.trainable, "model.norm.weight": state.trainable["model.norm.weight"] * -1}
    other.save(7, state._replace(trainable=moved), {})
    other.close()
    folder = tmp_path / "checkpoints" / "7" / "state"
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "other" / "7" / "state", folder)
    with pytest.raises(ConfigError, match=r"the numbers of trainable\.model\.norm\.weight are not"):
        open_in().restore(7, abstract(make_state(0)))


def test_a_checkpoint_without_checksums_is_refused(open_in, tmp_path):
    saved(open_in, 7).close()
    file = tmp_path / "checkpoints" / "7" / "meta" / "metadata"
    file.write_text(json.dumps({"position": {}, "data": "", "meter": {}}))
    with pytest.raises(ConfigError, match=r"7: got a checkpoint of an earlier version"):
        open_in().meta(7)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"record": {"meta": 1}}'])
def test_damaged_meta_is_refused_by_name(open_in, tmp_path, content):
    saved(open_in, 7).close()
    file = tmp_path / "checkpoints" / "7" / "meta" / "metadata"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ConfigError, match=r"7: got a damaged checkpoint .* to begin again"):
        open_in().meta(7)


@pytest.mark.parametrize(
    ("said", "reported"),
    [
        ("Event loop is closed", False),
        ("Encountered error while reading array index: (slice(0, 3, 1),)", False),
        ("something else", True),
    ],
)
def test_reads_that_a_failed_one_leaves_behind_are_not_reported(monkeypatch, said, reported):
    reports = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)
    with suppress(ValueError), orbax_store._silent_stragglers():
        raise ValueError
    late = SimpleNamespace(exc_value=RuntimeError(said))
    sys.unraisablehook(late)
    assert reports == ([late] if reported else [])


def test_reads_that_had_not_begun_are_not_warned_of(recwarn):
    async def read():
        """Stands for Orbax's read of one shard."""

    read.__qualname__ = "_read_array_index_and_device_put"
    with suppress(ValueError), orbax_store._silent_stragglers():
        raise ValueError
    never_awaited = read()
    del never_awaited
    assert not list(recwarn)


def _files_of(folder: Path) -> dict[str, Any]:
    """The content of the JSON files of a checkpoint by their paths."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with suppress(ValueError):
            found[str(file.relative_to(folder))] = json.loads(file.read_bytes())
    return found


def _spoil_files(checkpointer: Checkpointer, examples: int) -> None:
    folder, like = Path(checkpointer.place(3)), abstract(make_state(0))
    files = _files_of(folder)
    assert {"meta/metadata", "state/_METADATA"} <= files.keys()
    damaged = st.sampled_from(sorted(files)).flatmap(
        lambda name: st.tuples(st.just(name), spoilt(files[name]))
    )

    @settings(max_examples=examples)
    @given(damaged)
    def read(file: tuple[str, bytes]) -> None:
        whole = (folder / file[0]).read_bytes()
        (folder / file[0]).write_bytes(file[1])
        try:
            meta, state = checkpointer.meta(3), checkpointer.restore(3, like)
        except ConfigError as error:
            assert str(folder) in str(error) and len(str(error)) < 2_000
        else:
            assert meta == {"position": {"epoch": 0, "row": 3}}
            assert_same(state, make_state(3))
        finally:
            (folder / file[0]).write_bytes(whole)

    read()


@pytest.mark.parametrize("content", ["[]", "null", "7", "{", "{}", '{"record": []}', "[" * 90_000])
def test_a_record_of_another_form_is_refused(open_in, content):
    checkpointer = saved(open_in, 3)
    (Path(checkpointer.place(3)) / "meta" / "metadata").write_text(content)
    with pytest.raises(ConfigError, match="got a damaged checkpoint"):
        checkpointer.meta(3)


def test_damaged_files_are_read_as_they_were_or_refused(open_in):
    _spoil_files(saved(open_in, 3), 10)


@pytest.mark.slow
def test_many_damaged_files_are_read_as_they_were_or_refused(open_in):
    _spoil_files(saved(open_in, 3), 300)
