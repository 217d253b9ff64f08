# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: round trips, other meshes, donation, limits, damage, kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from spoilt import spoilt

from dsjax.config import CheckpointSection
from dsjax.distributed.checksums import named_leaves
from dsjax.errors import ConfigError
from dsjax.training import checkpoint
from dsjax.training.checkpoint import Checkpointer, RemovedError, from_newest

EVERY = CheckpointSection(save_steps=1, save_total_limit=None)


class State(NamedTuple):
    trainable: dict[str, jax.Array]
    opt_state: optax.OptState
    step: jax.Array
    rng: jax.Array


def make_state(step, width=6):
    params = {
        "model.norm.weight": jnp.full(width, float(step)),
        "model.layers.q_proj.weight": jnp.arange(8.0 * width).reshape(8, width).astype("bfloat16"),
    }
    optimizer = optax.adamw(1e-3, mask=dict.fromkeys(params, True))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return State(params, opt_state, jnp.int32(step), jax.random.key(step))


def abstract(tree, sharding=None):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)

    return jax.tree.map(leaf, tree)


def bits(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for name, leaf in named_leaves(expected).items():
        assert named_leaves(actual)[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(bits(named_leaves(actual)[name]), bits(leaf), name)


@pytest.fixture
def open_in(tmp_path):
    """Open Checkpointers in one directory; close them all at the end."""
    opened = []

    def open_one(section=EVERY, **options):
        opened.append(Checkpointer(tmp_path / "checkpoints", section, **options))
        return opened[-1]

    yield open_one
    for checkpointer in opened:
        checkpointer.close()


def saved(open_in, *steps):
    checkpointer = open_in()
    for step in steps:
        checkpointer.save(step, make_state(step), {"position": {"epoch": 0, "row": step}})
    checkpointer.wait()
    return checkpointer


def test_state_and_meta_come_back(open_in):
    saved(open_in, 3, 7)
    again = open_in()
    assert again.latest() == 7
    assert again.meta(7) == {"position": {"epoch": 0, "row": 7}}
    assert_same(again.restore(7, abstract(make_state(0))), make_state(7))
    assert_same(again.restore(3, abstract(make_state(0))), make_state(3))


def test_part_of_the_state_can_be_read_alone(open_in):
    checkpointer = saved(open_in, 3)
    wanted = {"trainable": abstract(make_state(0).trainable)}
    read = checkpointer.restore(3, wanted, partial=True)
    assert_same(read, {"trainable": make_state(3).trainable})


def test_restores_on_another_mesh(open_in):
    value = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    auto = (AxisType.Auto, AxisType.Auto)
    layouts = [
        NamedSharding(jax.make_mesh((4, 2), ("a", "b"), axis_types=auto), PartitionSpec("a", "b")),
        NamedSharding(jax.make_mesh((1, 8), ("a", "b"), axis_types=auto), PartitionSpec("b")),
        NamedSharding(jax.make_mesh((2, 4), ("a", "b"), axis_types=auto), PartitionSpec()),
        SingleDeviceSharding(jax.devices()[0]),
    ]
    for step, source in enumerate(layouts):
        state = {"w": jax.device_put(value, source)}
        checkpointer = open_in()
        checkpointer.save(step, state, {}, force=True)
        checkpointer.wait()
        for target in layouts:
            read = checkpointer.restore(step, abstract(state, target))["w"]
            assert read.sharding.is_equivalent_to(target, 2)
            np.testing.assert_array_equal(np.asarray(read), value)


def test_saves_when_due_or_forced_and_never_twice(open_in):
    checkpointer = open_in(CheckpointSection(save_steps=3, save_total_limit=None))
    assert [step for step in range(8) if checkpointer.due(step)] == [3, 6]
    started = [step for step in range(8) if checkpointer.save(step, make_state(step), {})]
    assert started == [3, 6]
    assert checkpointer.save(7, make_state(7), {}, force=True)
    for step in (6, 7):  # there already: another run would be overwritten
        with pytest.raises(ConfigError, match=rf"/{step}: got a checkpoint of step {step} that"):
            checkpointer.save(step, make_state(8), {}, force=True)
    assert_same(checkpointer.restore(7, abstract(make_state(0))), make_state(7))


def test_a_step_that_another_process_has_saved_is_not_replaced(open_in):
    ours, theirs = open_in(), open_in()  # both have looked before either saves
    theirs.save(3, make_state(3), {})
    theirs.wait()
    with pytest.raises(ConfigError, match=r"/3: got a checkpoint of step 3 that is there already"):
        ours.save(3, make_state(8), {})
    assert_same(theirs.restore(3, abstract(make_state(0))), make_state(3))


def test_keeps_the_newest(open_in, tmp_path):
    checkpointer = open_in(CheckpointSection(save_steps=1, save_total_limit=2))
    for step in (1, 2, 3, 10, 11):
        checkpointer.save(step, make_state(step), {})
    checkpointer.close()
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"10", "11"}


def test_empty_directory_has_no_latest(open_in):
    assert open_in().latest() is None


@pytest.mark.parametrize("sharded", [False, True])
def test_donated_buffers_do_not_change_what_is_saved(open_in, sharded):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    layout = NamedSharding(mesh, PartitionSpec("d" if sharded else None))

    @partial(jax.jit, out_shardings=layout)
    def fresh(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        return {f"w{i}": jax.random.normal(key, (512, 512)) for i, key in enumerate(keys)}

    @partial(jax.jit, donate_argnums=0)
    def spoil(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    jax.block_until_ready(spoil(fresh(0)))
    checkpointer = open_in()
    for step in range(1, 4):
        state = fresh(step)
        like = abstract(state)
        checkpointer.save(step, state, {})
        jax.block_until_ready(spoil(spoil(state)))
        del state
        assert_same(checkpointer.restore(checkpointer.latest(), like), fresh(step))


def test_other_leaves_shapes_and_dtypes_are_named(open_in, tmp_path):
    checkpointer = saved(open_in, 3)
    wanted = abstract(make_state(0, width=4))._asdict()
    wanted["loss_scale"] = wanted.pop("step")
    wanted["trainable"] = abstract(
        {**make_state(0).trainable, "model.norm.weight": jnp.zeros(6, jnp.bfloat16)}
    )
    with pytest.raises(ConfigError) as caught:
        checkpointer.restore(3, wanted)
    text = str(caught.value)
    assert str(tmp_path / "checkpoints" / "3") in text
    assert "choose another output_dir" in text
    assert "loss_scale: got nothing, expected int32[]" in text
    assert "\n  step: got int32[], expected no such leaf" in text
    assert "trainable.model.norm.weight: got float32[6], expected bfloat16[6]" in text
    assert "opt_state.0.mu.model.norm.weight: got float32[6], expected float32[4]" in text


def test_a_long_list_of_misfits_is_cut(open_in):
    checkpointer = open_in()
    checkpointer.save(1, {f"w{i}": jnp.zeros(2) for i in range(20)}, {})
    with pytest.raises(ConfigError, match=r"w0: got.*(\n.*)+and 12 more$"):
        checkpointer.restore(1, abstract({f"w{i}": jnp.zeros(3) for i in range(20)}))


def test_unfinished_checkpoints_are_announced_and_removed(open_in, tmp_path, capsys):
    saved(open_in, 3).close()
    half = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp-1234"
    shutil.copytree(tmp_path / "checkpoints" / "3", half)
    reader = open_in(read_only=True)
    assert reader.latest() == 3 and half.exists() and capsys.readouterr().out == ""
    checkpointer = open_in()
    assert checkpointer.latest() == 3
    assert capsys.readouterr().err == f"{half}: an unfinished checkpoint, not used and removed\n"
    checkpointer.save(5, make_state(5), {})
    assert checkpointer.latest() == 5 and not half.exists()


def test_reading_creates_nothing(open_in, tmp_path):
    assert open_in(read_only=True).latest() is None
    assert not (tmp_path / "checkpoints").exists()


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
        assert f"{writer.directory / str(step - 1)}: got a checkpoint that went away while" in said
        assert said.endswith("; now the newest is read\n") and "damaged" not in said
    for before in ("meta", "restore"):
        with pytest.raises(RemovedError, match="went away while it was read, expected it to stay"):
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
                assert ("went away" in str(error)) == alive, file  # noqa: PT017
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
    with pytest.raises(ConfigError, match=r"7: got a damaged checkpoint .* to start anew"):
        open_in().meta(7)


SAVING_FOREVER = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from dsjax.training.checkpoint import Checkpointer, RemovedError, from_newest
from dsjax.config import CheckpointSection

checkpointer = Checkpointer(Path(sys.argv[1]), CheckpointSection(save_steps=1, save_total_limit=1))
start = (checkpointer.latest() or 0) + 1
fill = jax.jit(lambda old, x: jax.tree.map(lambda a: a * 0 + x, old), donate_argnums=0)
state = {f"w{i}": jnp.zeros((256, 256)) for i in range(12)}
print("ready", flush=True)
for step in range(start, 10**6):
    state = fill(state, float(step))
    checkpointer.save(step, state, {"step": step})
"""


def run_and_kill(directory, seconds):
    command = [sys.executable, "-c", SAVING_FOREVER, str(directory)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines = iter(process.stdout.readline, "")
        assert any(line == "ready\n" for line in lines)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_sigkill_leaves_a_whole_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    like = abstract({f"w{i}": jnp.zeros((256, 256)) for i in range(12)})
    newest = 0
    for _ in range(8):
        run_and_kill(tmp_path, rng.uniform(0.1, 2.0))
        checkpointer = Checkpointer(tmp_path, EVERY, read_only=True)
        step = checkpointer.latest()
        if step is None:
            assert newest == 0
            continue
        assert step >= newest and checkpointer.meta(step) == {"step": step}
        expected = {name: jnp.full(leaf.shape, float(step)) for name, leaf in like.items()}
        assert_same(checkpointer.restore(step, like), expected)
        checkpointer.close()
        newest = step
    assert newest > 0
    last = Checkpointer(tmp_path, CheckpointSection(save_steps=1, save_total_limit=1))
    last.save(newest + 1, {"w": jnp.zeros(1)}, {})
    last.close()
    assert [path.name for path in tmp_path.iterdir()] == [str(newest + 1)]


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
    with suppress(ValueError), checkpoint._silent_stragglers():
        raise ValueError
    late = SimpleNamespace(exc_value=RuntimeError(said))
    sys.unraisablehook(late)
    assert reports == ([late] if reported else [])


def _files_of(folder: Path) -> dict[str, Any]:
    """The content of the JSON files of a checkpoint by their paths."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with suppress(ValueError):
            found[str(file.relative_to(folder))] = json.loads(file.read_bytes())
    return found


def _spoil_files(checkpointer: Checkpointer, examples: int) -> None:
    folder, like = checkpointer.directory / "3", abstract(make_state(0))
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
    (checkpointer.directory / "3" / "meta" / "metadata").write_text(content)
    with pytest.raises(ConfigError, match="got a damaged checkpoint"):
        checkpointer.meta(3)


def test_damaged_files_are_read_as_they_were_or_refused(open_in):
    _spoil_files(saved(open_in, 3), 10)


@pytest.mark.slow
def test_many_damaged_files_are_read_as_they_were_or_refused(open_in):
    _spoil_files(saved(open_in, 3), 300)
