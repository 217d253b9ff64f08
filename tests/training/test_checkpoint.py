# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: round trips, other meshes, donation, limits, kills."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import EVERY, abstract, assert_same, make_state, matrix_shardings, saved
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsjax.config import CheckpointSection
from dsjax.errors import ConfigError
from dsjax.training.checkpoint import Checkpointer


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
    layouts = matrix_shardings()
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
