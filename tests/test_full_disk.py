# SPDX-License-Identifier: Apache-2.0
"""A disk that takes no more, at every place that writes: the file is named, and later all is well.

A limit on the size of files stands for the disk: what is beyond it fails as on a full one.
"""

import gc
import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import tiny

import dsjax
from dsjax import train
from dsjax.config import CheckpointSection, LoggingSection
from dsjax.data.store import Example, ExampleStore
from dsjax.errors import ConfigError
from dsjax.training.checkpoint import Checkpointer
from dsjax.training.event_file import EventFile
from dsjax.training.loss_plot import plot_loss
from dsjax.training.metrics_log import MetricsLog
from dsjax.training.run_dir import RunDir
from dsjax.weights.convert import to_flax, to_hf
from dsjax.weights.folders import atomic_directory, write_atomic
from dsjax.weights.safetensors import SafetensorsWriter

KIB = 1024
ROOT = Path(__file__).parents[1]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_metrics(folder: Path) -> str:
    with MetricsLog(RunDir(folder), LoggingSection(report_to=[]), 0) as log:
        for step in range(1, 60):
            log.log(step, {"loss": 1 / 3, "accuracy": 1 / 3, "grad_norm": 1 / 3, "tokens": step})
    return "metrics.jsonl"


def write_events(folder: Path) -> str:
    with closing(EventFile(folder / "tensorboard", 0)) as file:
        file.scalars(1, {"loss": 1.0})
        file.text(1, "config", "x" * 50 * KIB)
    return "tensorboard"


def write_text(folder: Path) -> str:
    write_atomic(folder / "config.yaml", "x" * 50 * KIB)
    return "config.yaml"


def write_picture(folder: Path) -> str:
    lines = "".join(f'{{"step": {step}, "loss": {1 / (step + 1)}}}\n' for step in range(60))
    (folder / "metrics.jsonl").write_text(lines)
    plot_loss(folder)
    return "training_loss.png"


def write_tensors(folder: Path) -> str:
    with atomic_directory(folder / "export") as directory:
        entries = [("a", np.dtype(np.float32), (64 * KIB,))]
        with SafetensorsWriter(directory / "model.safetensors", entries) as writer:
            writer.append("a", np.ones(64 * KIB, np.float32))
    return ".export.partial/model.safetensors"


def write_card(folder: Path) -> str:
    with atomic_directory(folder / "export") as directory:
        (directory / "README.md").write_text("x" * 50 * KIB)
    return "export"


def write_examples(folder: Path) -> str:
    store, field = ExampleStore(), np.ones(4 * KIB, np.int32)
    for _ in range(8):
        store.append(Example(field, field, field.astype(np.float32)))
    store.finalize()
    return "the folder for temporary files (TMPDIR)"


def write_checkpoint(folder: Path) -> str:
    saver = Checkpointer(folder / "checkpoints", CheckpointSection(save_steps=1))
    chance = np.random.default_rng(0)
    state = {str(i): jnp.asarray(chance.normal(size=100 * KIB), jnp.float32) for i in range(4)}
    try:
        saver.save(1, state, {"position": 0})
        saver.wait()
        assert saver.latest() == 1
    finally:
        saver.close()
    return "checkpoints/1.orbax-checkpoint-tmp/"


WRITERS: list[Callable[[Path], str]] = [
    write_metrics,
    write_events,
    write_text,
    write_picture,
    write_tensors,
    write_card,
    write_examples,
    write_checkpoint,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_file_is_named_and_the_next_attempt_succeeds(
    write: Callable[[Path], str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    for logger in ("absl", "asyncio"):  # as in every command: writes left behind report there
        caplog.set_level(logging.CRITICAL, logger)
    for name in ("other", "run"):
        (tmp_path / name).mkdir()
    expected = write(tmp_path / "other")  # what it needs is imported
    with no_file_above(6 * KIB), pytest.raises(ConfigError) as error:
        write(tmp_path / "run")
    named = expected if expected.startswith("the") else f"{tmp_path}/run/{expected}"
    assert str(error.value).startswith(named) and "\n" not in str(error.value)
    assert "got 'File too large' from the system, expected a file that" in str(error.value)
    assert "ulimit -f" in str(error.value)
    assert not (tmp_path / "run" / ".export.partial").exists()
    assert write(tmp_path / "run") == expected
    assert "Traceback" not in capfd.readouterr().err
    gc.collect()


def test_a_run_that_has_no_room_is_refused_before_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The state of all that trains three times over, in float32, and a model of 83,280 numbers."""
    config = small_run.write_inputs(tmp_path, "full")
    usage = shutil.disk_usage(tmp_path)
    needed = 3 * 69_456 * 4 + 83_280 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    words = ["--config", str(config), "training.batch_size=16"]
    message = (
        r"^output_dir: got 1\.1 MiB free at .*, expected at least 0\.8 MiB for a checkpoint and "
        r"0\.3 MiB for the export; free some space there, or choose another place$"
    )
    with pytest.raises(ConfigError, match=message):
        train.main(words)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_not_begun_where_it_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = tiny.build_checkpoint(tmp_path / "model", "llama_gqa")
    to_flax(str(model), str(tmp_path / "flax"))
    loaded = dsjax.load_pretrained(str(model), dtype="float32")
    usage, needed, out = shutil.disk_usage(tmp_path), 83_280 * 4, tmp_path / "out"
    write = {
        "to-flax": lambda: to_flax(str(model), str(out)),
        "to-hf": lambda: to_hf(str(tmp_path / "flax"), str(out)),
        "save_pretrained": lambda: dsjax.save_pretrained(loaded, str(out)),
    }
    for begin in write.values():
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(ConfigError, match="^output directory: got .* for the checkpoint; free"):
            begin()
        assert {path.name for path in tmp_path.iterdir()} == {"model", "flax"}
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        begin()
        shutil.rmtree(out)


def test_what_a_killed_run_left_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = small_run.write_inputs(tmp_path, "full")
    run, needed = tmp_path / "run", 3 * 69_456 * 4 + 83_280 * 4
    usage = shutil.disk_usage(tmp_path)
    (run / ".export.partial").mkdir(parents=True)
    half = run / ".export.partial" / "model.safetensors"
    half.write_bytes(bytes(83_280 * 4))
    reached = RuntimeError("there is room")

    def compile_step(*_: object) -> None:
        raise reached

    monkeypatch.setattr(train, "compile_step", compile_step)
    words = ["--config", str(config), "training.batch_size=16"]

    def with_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        train.main(words)

    with pytest.raises(RuntimeError, match="there is room"):
        with_free(needed - 83_280 * 4 + 1000)  # the counters of the state
    # Checkpoints come before what is left of an export goes.
    half.write_bytes(bytes(needed))
    with pytest.raises(ConfigError, match="at least 0.8 MiB for a checkpoint; free some space"):
        with_free(1000)
    saved = run / "checkpoints" / "5.orbax-checkpoint-tmp"
    saved.mkdir(parents=True)
    (saved / "half").write_bytes(bytes(needed))
    with pytest.raises(RuntimeError, match="there is room"):
        with_free(1000)


@pytest.mark.slow
def test_a_run_goes_on_where_the_disk_was_full(tmp_path: Path):
    config = small_run.write_inputs(tmp_path, "full")
    tiny.build_checkpoint(tmp_path / "model", "llama_gqa", vocab_size=4096)
    whole = tmp_path / "whole"
    small_run.finish(config, f"output_dir={whole}")
    command = [sys.executable, "-m", "dsjax.train", "--config", str(config)]
    # Three leaves of a checkpoint have 864 KiB each; how leaves share files is chance.
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 400; exec "$@"', "-", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/run/checkpoints/5.orbax-checkpoint-tmp/")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    small_run.finish(config)
    assert small_run.metrics(tmp_path / "run") == small_run.metrics(whole)
    found, expected = (small_run.contents(path / "export") for path in (tmp_path / "run", whole))
    for name in expected.keys() - {"README.md", "dsjax_export.json"}:
        assert found[name] == expected[name], name
