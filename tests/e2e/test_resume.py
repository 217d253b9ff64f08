# SPDX-License-Identifier: Apache-2.0
"""Running again: what is resumed, what is only completed, and what is refused without a trace.

One run is trained once, in a process of its own on one device. Each test starts the real command on
a copy of it, in this process for speed: its eight devices are another mesh than the run began on.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import small_run
import yaml

from dsjax import train
from dsjax.errors import ConfigError
from dsjax.run_folder import claimed

TOTAL = 12
LOSS_BOUND = 1e-5  # relative; float32 sums in another order on another mesh


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a finished run, in the folder `run` beside it."""
    config = small_run.write_inputs(tmp_path_factory.mktemp("resume"), "lora")
    small_run.finish(config)
    return config


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished.parent / "run", tmp_path / "run")


@pytest.fixture
def again(finished: Path, run: Path, capsys) -> Callable[..., str]:
    """Run the same command on the copy, with overrides; return what it said on stderr."""

    def call(*overrides: str) -> str:
        words = ["--config", str(finished), f"output_dir={run}", *overrides]
        assert train.main(words) == 0
        return capsys.readouterr().err

    return call


def refused(again: Callable[..., str], *overrides: str) -> str:
    """Run the command, which must refuse; return its message."""
    with pytest.raises(ConfigError) as error:
        again(*overrides)
    return str(error.value)


def unfinish(run: Path) -> None:
    """Leave a run as a kill after step 10 would have."""
    for name in ("export", f"checkpoints/{TOTAL}"):
        shutil.rmtree(run / name)
    for name in ("training_loss.png", "eval_results.json"):
        (run / name).unlink()


def test_a_finished_run_is_left_alone(again, run: Path):
    before = small_run.states(run)
    assert "nothing to do" in again()
    assert small_run.states(run) == before


def test_only_the_export_is_made_again(again, run: Path, finished: Path):
    shutil.rmtree(run / "export")
    before = small_run.contents(run / "checkpoints"), small_run.metrics(run)
    again()
    assert (small_run.contents(run / "checkpoints"), small_run.metrics(run)) == before
    original = small_run.contents(finished.parent / "run" / "export")
    assert small_run.contents(run / "export") == original


def test_an_export_with_a_file_missing_is_made_again(again, run: Path):
    before = small_run.contents(run / "export")
    next((run / "export").glob("*.safetensors")).unlink()
    again()
    assert small_run.contents(run / "export") == before


def test_a_damaged_evaluation_is_made_again(again, run: Path):
    before = (run / "eval_results.json").read_bytes()
    (run / "eval_results.json").write_text("{")
    again()
    assert (run / "eval_results.json").read_bytes() == before


def test_only_the_picture_is_made_again(again, run: Path):
    (run / "training_loss.png").unlink()
    before = small_run.states(run)
    assert "reading weights" not in again()
    after = small_run.states(run)
    assert after.keys() - before.keys() == {"training_loss.png"}
    del after["training_loss.png"], after["."], before["."]
    assert after == before


def test_only_the_evaluation_is_made_again(again, run: Path, finished: Path):
    (run / "eval_results.json").unlink()
    lines, export = small_run.metrics(run), small_run.states(run / "export")
    again()
    assert small_run.metrics(run) == lines
    assert small_run.states(run / "export") == export
    results = json.loads((run / "eval_results.json").read_text())
    original = json.loads((finished.parent / "run" / "eval_results.json").read_text())
    assert results == pytest.approx(original, rel=LOSS_BOUND)


def test_another_format_replaces_the_export(again, run: Path):
    again("export.format=peft")
    assert (run / "export" / "adapter_config.json").is_file()
    assert not (run / "export" / "config.json").exists()
    assert "nothing to do" in again("export.format=peft")


def test_resumes_on_another_mesh(again, run: Path, finished: Path):
    unfinish(run)
    said = again("mesh.data=2", "mesh.fsdp=4")
    assert f"resuming after step 10 of {TOTAL}" in said
    rows, original = small_run.metrics(run), small_run.metrics(finished.parent / "run")
    assert len(rows) == len(original)
    for row, expected in zip(rows, original, strict=True):
        assert row == pytest.approx(expected, rel=LOSS_BOUND), row


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(again, run: Path):
    said = again("training.max_steps=14", "logging.logging_steps=1", "checkpoint.save_steps=7")
    assert f"resuming after step {TOTAL} of 14" in said
    steps = [row["step"] for row in small_run.metrics(run) if "loss" in row]
    assert steps == [2, 4, 6, 8, 10, 12, 13, 14]
    assert json.loads((run / "eval_results.json").read_text())["step"] == 14
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["max_steps"] == 14


def test_a_directory_in_which_a_run_is_going_on_is_refused(again, run: Path):
    shutil.rmtree(run / "export")
    with claimed(run):
        assert f"output_dir: got {str(run)!r}, in which another process" in refused(again)
    assert not (run / "export").exists()
    again()
    assert (run / "export").is_dir()


def test_fewer_steps_than_done_are_refused(again, run: Path):
    (run / "checkpoints" / "7.orbax-checkpoint-tmp-1").mkdir()
    before = small_run.states(run)
    message = refused(again, "training.max_steps=11")
    assert message.startswith("training.max_steps: got 11 steps, expected at least the 12")
    assert small_run.states(run) == before


CHANGES = {
    "optimizer.learning_rate": "0.02",
    "training.seed": "7",
    "training.batch_size": "16",
    "data.train": "{folder}/eval.jsonl",
    "adapter.r": "8",
    "model.dtype": "bfloat16",
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_configuration_is_refused(again, run: Path, finished: Path, key: str):
    before = small_run.states(run)
    message = refused(again, f"{key}={CHANGES[key].format(folder=finished.parent)}")
    assert message.startswith("output_dir: got ") and f"with other {key}, expected" in message
    assert small_run.states(run) == before


def test_all_differences_are_named(again):
    message = refused(again, "optimizer.learning_rate=0.02", "training.seed=7")
    assert "with other optimizer.learning_rate, training.seed, expected" in message


def test_checkpoints_without_a_config_are_refused(again, run: Path):
    (run / "config.yaml").unlink()
    before = small_run.states(run)
    message = refused(again)
    assert message.startswith("output_dir: got ") and "without config.yaml" in message
    assert small_run.states(run) == before


def damage_largest_file(checkpoint: Path, how: Callable[[bytes], bytes]) -> None:
    """Change the file that holds most of a checkpoint's arrays."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    file.write_bytes(how(file.read_bytes()))


@pytest.mark.parametrize(
    "how",
    [lambda data: data[: len(data) // 2], lambda data: bytes(len(data))],
    ids=["truncated", "zeros"],
)
def test_damaged_newest_checkpoint_is_refused_by_name(again, run: Path, how):
    unfinish(run)
    damage_largest_file(run / "checkpoints" / "10", how)
    before = small_run.contents(run)
    message = refused(again)
    assert f"{run}/checkpoints/10: got a damaged checkpoint" in message
    assert "delete this folder to continue from step 5" in message
    assert small_run.contents(run) == before


def test_unfinished_checkpoint_is_not_used(again, run: Path, finished: Path):
    unfinish(run)
    checkpoints = run / "checkpoints"
    shutil.move(checkpoints / "10", checkpoints / "10.orbax-checkpoint-tmp-1")
    assert f"resuming after step 5 of {TOTAL}" in again()
    original = small_run.metrics(finished.parent / "run")
    steps = [row["step"] for row in small_run.metrics(run)]
    assert steps == [row["step"] for row in original]


def test_kill_between_the_renames_of_an_export(again, run: Path):
    """The old export was moved away, the new one had not come yet."""
    before = small_run.contents(run / "export")
    (run / "export").rename(run / ".export.old")
    shutil.copytree(run / ".export.old", run / ".export.partial")
    again()
    assert small_run.contents(run / "export") == before
    assert not list(run.glob(".export*"))


@pytest.mark.slow
def test_a_diverged_state_is_not_saved(finished: Path, tmp_path: Path):
    """However seldom a line is logged, good checkpoints are not pushed out by useless ones."""
    words = ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=2", "checkpoint.save_steps=1"]
    words += ["logging.logging_steps=100", "training.eval_steps=null", "training.max_steps=50"]
    with pytest.raises(ConfigError, match="loss: got .* lower optimizer.learning_rate"):
        train.main(["--config", str(finished), f"output_dir={tmp_path}", *words])
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert saved and max(saved) <= 3


REFUSED_BEFORE_ANYTHING = {
    "row": (["data.train={folder}/bad.jsonl"], "bad.jsonl:2"),
    "adapter": (["adapter.path={folder}/nowhere"], "adapter.path"),
    "checkpoint": (["model.path={folder}/no_model"], "model.path"),
    "mesh": (["mesh.tensor=3"], "mesh"),
    "batch": (["training.batch_size=12"], "training.batch_size"),
    "export": (["export.path={folder}/model"], "export.path"),
    "export_of_inputs": (["export.path={folder}"], "export.path"),
    "export_of_the_run": (["export.path={folder}/new"], "export.path"),
    "export_of_checkpoints": (["export.path={folder}/new/checkpoints"], "export.path"),
}


@pytest.mark.parametrize("case", REFUSED_BEFORE_ANYTHING)
def test_refused_run_leaves_nothing_behind(again, finished: Path, case: str):
    folder = finished.parent
    (folder / "bad.jsonl").write_text('{"input_ids": [5, 6]}\n{"input_ids": [5, "x"]}\n')
    (folder / "no_model").mkdir(exist_ok=True)
    overrides, named = REFUSED_BEFORE_ANYTHING[case]
    before = small_run.states(folder)
    words = [word.format(folder=folder) for word in overrides]
    message = refused(again, f"output_dir={folder}/new", *words)
    assert named in message.split(": got")[0] or named in message.split()[0], message
    assert not (folder / "new").exists()
    assert small_run.states(folder) == before


def test_changed_rows_are_refused(again, run: Path, finished: Path):
    """The same file name, other rows: neither half of the run would be what it says."""
    unfinish(run)
    before = small_run.contents(run)
    rows = finished.parent / "train.jsonl"
    text = rows.read_text()
    lines = text.splitlines(keepends=True)
    try:
        rows.write_text("".join([*lines[1:], lines[0]]))
        message = refused(again)
    finally:
        rows.write_text(text)
    assert message.startswith("data.train: got ") and "has been trained on" in message
    assert small_run.contents(run) == before


def test_foreign_folder_in_the_export_s_place_is_refused(again, run: Path, tmp_path: Path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    before = small_run.states(tmp_path)
    message = refused(again, f"export.path={foreign}")
    assert message.startswith("export.path: got ") and "is not empty" in message
    assert small_run.states(tmp_path) == before


def test_another_run_s_export_is_not_replaced(again, run: Path, tmp_path: Path):
    """Two runs that share an `export.path` by oversight; nor is one taken for the other's."""
    out = tmp_path / "out"
    again(f"export.path={out}")
    before = small_run.states(out)
    other = ["optimizer.learning_rate=0.02", f"output_dir={tmp_path}/other", f"export.path={out}"]
    message = refused(again, *other)
    assert message.startswith("export.path: got ") and "export of another run" in message
    assert small_run.states(out) == before
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_export_of_the_same_configuration_on_other_data_is_made_again(
    again, run: Path, finished: Path, tmp_path: Path
):
    """A row was corrected, the output directory removed, and everything started anew."""
    out = shutil.copytree(run / "export", tmp_path / "out")
    rows = finished.parent / "train.jsonl"
    text = rows.read_text()
    before = small_run.contents(out)
    shutil.rmtree(run)
    lines = text.splitlines(keepends=True)
    try:
        rows.write_text("".join([*lines[1:], lines[1]]))
        again(f"export.path={out}")
    finally:
        rows.write_text(text)
    after = small_run.contents(out)
    assert after.keys() == before.keys()
    assert any(after[name] != before[name] for name in after if name.endswith(".safetensors"))
