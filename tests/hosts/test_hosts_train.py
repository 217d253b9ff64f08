# SPDX-License-Identifier: Apache-2.0
"""Several processes train what one trains; stopped or killed and started anew, they end alike.

Bit by bit on the same mesh and number of processes, within 1e-5 on another: sums of float32 are
then taken in another order.
"""

import json
import random
import signal
from pathlib import Path

import multi_process
import numpy as np
import object_store
import pytest
import small_run
from safetensors.numpy import load_file

BOUND = 1e-5  # relative to the largest weight of a tensor, or to the value
SECONDS_TO_END = 60


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a LoRA run of 24 steps, exported as an adapter."""
    folder = tmp_path_factory.mktemp("hosts")
    return small_run.write_inputs(
        folder,
        "lora",
        training={"max_steps": 24, "eval_steps": 15},
        # Where a gradient is nearly nothing, Adam would make a step of its rounding.
        optimizer={"adam_epsilon": 1e-3},
        export={"format": "peft"},
        checkpoint={"save_steps": 7},
    )


@pytest.fixture(scope="module")
def undisturbed(lora: Path) -> Path:
    """The folder of that run by two processes of two devices."""
    whole = lora.parent / "whole"
    run = multi_process.finish(lora, f"output_dir={whole}", processes=2, devices=2)
    assert "step 24/24" in run.said(0) and "step " not in run.said(1)
    return whole


def assert_close(run: Path, reference: Path) -> None:
    """Compare what two meshes have trained."""
    found, expected = small_run.metrics(run), small_run.metrics(reference)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.get("tokens") == other.get("tokens")
        for key in {"loss", "eval_loss", "grad_norm"} & row.keys():
            assert row[key] == pytest.approx(other[key], rel=BOUND)
    files = sorted(path.name for path in (reference / "export").iterdir())
    assert sorted(path.name for path in (run / "export").iterdir()) == files
    for name in (name for name in files if name.endswith(".safetensors")):
        tensors, others = load_file(run / "export" / name), load_file(reference / "export" / name)
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            bound = BOUND * max(float(np.abs(others[key]).max()), 1e-3)
            assert np.abs(tensor - others[key]).max() <= bound, key


def assert_same(run: Path, reference: Path) -> None:
    """Compare what the same processes have trained, byte by byte."""
    assert small_run.metrics(run) == small_run.metrics(reference)
    found, expected = (small_run.contents(path / "export") for path in (run, reference))
    # The model card and the marker tell the summary's speed and the files' sizes.
    for name in expected.keys() - {"README.md", "dsjax_export.json"}:
        assert found[name] == expected[name], name
    left = [str(path) for path in run.rglob("*") if "partial" in path.name or "tmp" in path.name]
    assert left == []


def newest(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_two_processes_train_what_one_trains(lora: Path, undisturbed: Path):
    alone = lora.parent / "alone"
    multi_process.finish(lora, f"output_dir={alone}", processes=1, devices=4)
    assert_close(undisturbed, alone)
    starts = [row for row in small_run.scalars(undisturbed) if row[0] == "train/loss"]
    assert len(starts) == 12  # by one process


@pytest.mark.slow
def test_devices_talk_once_all_have_read_the_weights(lora: Path, tmp_path: Path):
    script = str(Path(__file__).with_name("late.py"))
    words = [script, "--config", str(lora), f"output_dir={tmp_path}/run"]
    run = multi_process.start(tmp_path, words, 2, devices=2)
    assert run.codes() == [0, 0], [run.said(i)[-3000:] for i in range(2)]


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(lora: Path, undisturbed: Path):
    folder = lora.parent / "stopped"
    run = multi_process.train(lora, f"output_dir={folder}", processes=2, devices=2)
    run.wait_until(lambda: small_run.logged_steps(folder) >= 2)
    assert multi_process.stopped(run, 1) == [143, 143]
    done = newest(folder)
    assert 4 <= done < 24 and "stopped by SIGTERM" in run.said(0)
    run = multi_process.finish(lora, f"output_dir={folder}", processes=2, devices=2)
    assert f"resuming after step {done} of 24" in run.said(0)
    assert_same(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_signal_during_the_compilation_ends_all(lora: Path, process: int):
    folder = lora.parent / f"early{process}"
    run = multi_process.train(lora, f"output_dir={folder}", processes=2, devices=2)
    run.wait_until(lambda: "one row, the trained part marked" in run.said(0))
    assert multi_process.stopped(run, process) == [143, 143]
    other = 1 - process
    assert f"process {process} ended by SIGTERM" in run.said(other)
    assert "Traceback" not in run.said(0) + run.said(1)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [[1], [0]])
def test_killed_processes_end_all(lora: Path, undisturbed: Path, victims: list[int]):
    folder = lora.parent / f"killed{len(victims)}{victims[0]}"
    run = multi_process.train(lora, f"output_dir={folder}", processes=2, devices=2)
    steps = random.Random(str(victims)).randrange(2, 8)
    run.wait_until(lambda: small_run.logged_steps(folder) >= steps)
    for process in victims:
        run.processes[process].kill()
    codes = run.codes(SECONDS_TO_END)
    assert 0 not in codes and all(codes[process] == -signal.SIGKILL for process in victims)
    if victims == [1]:
        silent = "process 1 has not been heard from for 30 s: it, or its machine, is gone"
        assert silent in run.said(0)
    if victims == [0]:  # in jax's words: the coordinator was on process 0
        assert "leader task was preempted/died/restarted" in run.said(1)
    multi_process.finish(lora, f"output_dir={folder}", processes=2, devices=2)
    assert_same(folder, undisturbed)


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(lora: Path):
    code = """
import sys
from dsjax import errors, train
from dsjax.data import Loader
batch = Loader.batch
def broken(self, step):
    if step == 9 and sys.argv[-1] == "1":
        raise OSError("the disk is gone")
    return batch(self, step)
Loader.batch = broken
errors.run_command(train.main)
"""
    words = ["-c", code, "--config", str(lora), f"output_dir={lora.parent / 'broken'}"]
    run = multi_process.start(lora.parent, words, 2, 2)
    assert run.codes(300) == [1, 1]
    assert "Traceback" in run.said(1) and "OSError: the disk is gone" in run.said(1)
    assert "process 1 failed: OSError: the disk is gone" in run.said(0)
    assert "Traceback" not in run.said(0)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_signal_during_the_last_exchange_ends_all(lora: Path, process: int):
    """One process has told the others that it goes on, and is asked to stop before it does."""
    code = """
import os, signal, sys, time
from dsjax import errors, train
from dsjax.distributed.processes import Hosts
any_preemption = Hosts.any_preemption
def signalled_meanwhile(self):
    answer = any_preemption(self)
    if self.index == SIGNALLED:
        os.kill(os.getpid(), signal.SIGTERM)
        while self._asked is None:
            time.sleep(0.001)
    return answer
Hosts.any_preemption = signalled_meanwhile
errors.run_command(train.main)
"""
    folder = lora.parent / f"last{process}"
    words = ["-c", code.replace("SIGNALLED", str(process)), "--config", str(lora)]
    run = multi_process.start(lora.parent, [*words, f"output_dir={folder}"], 2, 2)
    assert run.codes(300) == [143, 143]
    assert "stopping after step 24" in run.said(process)
    assert f"process {process} ended by SIGTERM" in run.said(1 - process)
    assert newest(folder) == 24 and not (folder / "export").exists()


@pytest.mark.slow
def test_other_processes_and_meshes_continue(lora: Path, undisturbed: Path):
    folder = lora.parent / "elastic"
    chance = random.Random(5)
    for processes, devices, mesh in (
        (4, 1, ["mesh.tensor=2"]),
        (1, 2, []),
        (2, 2, ["mesh.fsdp=1", "mesh.sequence=4"]),
    ):
        before = small_run.logged_steps(folder)
        words = [f"output_dir={folder}", *mesh]
        run = multi_process.train(lora, *words, processes=processes, devices=devices)
        run.wait_until(lambda before=before: small_run.logged_steps(folder) >= before + 1)
        assert multi_process.stopped(run, chance.randrange(processes)) == [143] * processes
    data = ["mesh.fsdp=1", "mesh.data=2"]
    multi_process.finish(lora, f"output_dir={folder}", *data, processes=2, devices=1)
    assert_close(folder, undisturbed)
    run = multi_process.finish(lora, f"output_dir={folder}", processes=2, devices=1)
    assert "nothing to do" in run.said(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "variant", "form", "processes"),
    [
        ("lora", "llama_gqa", "merged", 2),
        ("full", "deepseek_v3", "merged", 4),
        ("lora", "deepseek_v3", "peft", 2),
        ("prefix", "llama_gqa", "peft", 2),
    ],
)
def test_kinds_and_exports(tmp_path: Path, kind: str, variant: str, form: str, processes: int):
    targets = {"target_modules": r".*\.(q_b_proj|o_proj|experts\.\d+\.(gate|up|down)_proj)"}
    # Adam divides a gradient's rounding by the gradient: what is nearly zero moves by up to 1e-4 of
    # the learning rate more or less, so a small one is taken. A row too many moves it by all of it.
    more = {"export": {"format": form}, "optimizer": {"learning_rate": 1e-3}}
    if (kind, form) == ("lora", "peft"):
        more["adapter"] = targets | {"lora_dropout": 0.0}
    config = small_run.write_inputs(tmp_path, kind, variant=variant, **more)
    experts = ["mesh.expert=2"] if variant == "deepseek_v3" else []
    mesh = ["mesh.tensor=2", *experts]
    alone = tmp_path / "alone"
    multi_process.finish(config, f"output_dir={alone}", *mesh, processes=1, devices=4)
    folder = tmp_path / "together"
    words = [f"output_dir={folder}", *mesh]
    multi_process.finish(config, *words, processes=processes, devices=4 // processes)
    assert_close(folder, alone)
    marker = json.loads((folder / "export" / "dsjax_export.json").read_text())
    assert marker["format"] == form


@pytest.mark.slow
def test_processes_that_share_a_bucket_and_no_disk_train_alike(lora: Path, undisturbed: Path):
    """Each writes its part of a checkpoint; the first completes it, and writes all else."""
    store = lora.parent / "store"
    run = store / "bucket" / "run"
    told = ["--config", str(lora), "output_dir=store://bucket/run"]
    words = object_store.words(store, "dsjax.train", *told)
    folders = [lora.parent / name for name in ("here", "there")]
    for folder in folders:
        folder.mkdir()
    whole = multi_process.start(lora.parent, words, 2, devices=2, folders=folders)
    assert whole.codes() == [0, 0], [whole.said(i)[-3000:] for i in range(2)]
    assert_same(run, undisturbed)
    parts = sorted(path.name for path in (run / "checkpoints" / "24").iterdir())
    assert parts == ["0", "0.json", "1", "1.json", "record.json"]
