# SPDX-License-Identifier: Apache-2.0
"""Running again: what is resumed, what is only completed, and what is refused without a trace.

One run is trained once, in a process of its own on one device. Each test starts the real command on
a copy of it, in this process for speed: its eight devices are another mesh than the run began on.
"""

import json
import re
import shutil
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import small_run
import yaml

from dsjax import evaluate, train
from dsjax.config import CheckpointSection, load_config
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.export import command as export
from dsjax.export.model_card import card_facts
from dsjax.training import run_data, setup
from dsjax.training.checkpoint import Checkpointer
from dsjax.training.loop import Loop
from dsjax.training.run_dir import MANIFEST, RunDir, locked_run_dir
from dsjax.weights.safetensors import read_header

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


def assert_same_results(run: Path, original: dict[str, Any]) -> None:
    """Compare an evaluation on another mesh with the original."""
    results = json.loads((run / "eval_results.json").read_text())
    for name in ("run", "data"):
        assert results.pop(name) == original[name]
    assert results == pytest.approx({name: original[name] for name in results}, rel=LOSS_BOUND)
    assert results.keys() == original.keys() - {"run", "data"}


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


@pytest.mark.parametrize("kind", ["safetensors", "md"])
def test_an_export_with_a_changed_byte_is_made_again(again, run: Path, kind: str):
    """Neither a bad disk nor an editor changes a file's name, and not always its size."""
    before = small_run.contents(run / "export")
    name = next(name for name in before if name.endswith(f".{kind}"))
    content = bytearray(before[name])
    content[-3] ^= 1
    (run / "export" / name).write_bytes(content)
    again()
    assert small_run.contents(run / "export") == before


def test_a_damaged_evaluation_is_made_again(again, run: Path):
    original = json.loads((run / "eval_results.json").read_text())
    (run / "eval_results.json").write_text("{")
    again()
    assert_same_results(run, original)


def test_only_the_picture_is_made_again(again, run: Path):
    (run / "training_loss.png").unlink()
    before = small_run.states(run)
    assert "reading weights" not in again()
    after = small_run.states(run)
    assert after.keys() - before.keys() == {"training_loss.png"}
    del after["training_loss.png"]
    assert after == before


def test_only_the_evaluation_is_made_again(again, run: Path, finished: Path):
    (run / "eval_results.json").unlink()
    lines, export = small_run.metrics(run), small_run.states(run / "export")
    again()
    assert small_run.metrics(run) == lines
    assert small_run.states(run / "export") == export
    original = json.loads((finished.parent / "run" / "eval_results.json").read_text())
    assert_same_results(run, original)


def test_other_rows_under_the_same_name_are_evaluated(
    again, run: Path, finished: Path, tmp_path: Path
):
    """The rows count, not the name of their file; the model card shows the results too."""
    rows = Path(shutil.copy(finished.parent / "eval.jsonl", tmp_path / "rows.jsonl"))
    before = json.loads((run / "eval_results.json").read_text())
    card = (run / "export" / "README.md").read_text()
    assert "nothing to do" in again(f"data.eval={rows}")
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:9]))
    again(f"data.eval={rows}")
    after = json.loads((run / "eval_results.json").read_text())
    assert after["eval_tokens"] < before["eval_tokens"] and after["data"] != before["data"]
    assert (run / "export" / "README.md").read_text() != card
    assert "nothing to do" in again(f"data.eval={rows}")


def test_an_evaluation_of_another_training_is_not_taken_for_this_one_s(again, run: Path):
    """Checkpoints and export were removed by hand, and the run started anew."""
    text = (run / "eval_results.json").read_text()
    results = json.loads(text)
    (run / "eval_results.json").write_text(json.dumps(results | {"run": "another"}))
    again()
    assert json.loads((run / "eval_results.json").read_text())["run"] == results["run"]


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


class Several(Hosts):
    """A process alone that takes itself for one of two."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def all_gather_text(self, text: str) -> list[str]:
        """Its own text, which all agree on."""
        return [text]


@pytest.mark.parametrize("key", ["data.eval", "data.val_size"])
def test_a_training_whose_evaluation_always_fails_ends_without_it(
    again, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys, key: str
):
    """By the words that the message gives: the key that the user set, and its companion."""
    shutil.rmtree(run)
    given = [f"output_dir={run}", "training.max_steps=4", "training.eval_steps=2"]
    given += ["data.eval=null", "data.val_size=8"] if key == "data.val_size" else []
    evaluate_at = Loop.evaluate

    def fail_at_the_end(self: Loop, state: Any, step: int, *arguments: Any) -> dict[str, Any]:
        if step == self.total:
            raise RuntimeError("no such kernel")
        return evaluate_at(self, state, step, *arguments)

    monkeypatch.setattr(Loop, "evaluate", fail_at_the_end)
    with pytest.raises(RuntimeError, match="no such kernel"):
        train.train(load_config(finished, given), Several())
    assert not (run / "export").exists()
    said = re.search("evaluation failed; with (.*) the run ends without\n", capsys.readouterr().err)
    assert said is not None and said[1] == f"{key}=null training.eval_steps=null"
    lines = small_run.metrics(run)
    for _ in range(2):
        words = {word.partition("=")[0]: word for word in [*given, *said[1].split()]}
        told = again(*words.values())
        stay = "data.val_size: the rows that the run began to hold out (8) stay out of its training"
        assert (stay in told) == (key == "data.val_size")
        assert (run / "export").is_dir() and not (run / "eval_results.json").exists()
        assert small_run.metrics(run) == lines
    assert "nothing to do" in told
    held_out = yaml.safe_load((run / "config.yaml").read_text())["data"]["val_size"]
    assert held_out == (8 if key == "data.val_size" else None)


def test_a_directory_in_which_a_run_is_going_on_is_refused(again, run: Path):
    shutil.rmtree(run / "export")
    with locked_run_dir(RunDir(run)):
        assert f"output_dir: got {str(run)!r}, in which another process" in refused(again)
    assert not (run / "export").exists()
    again()
    assert (run / "export").is_dir()


def waits_to_write(config: Path, *overrides: str) -> Popen[str]:
    """Start a run and stop it where it has looked at everything and not begun to train."""
    before = len(small_run.log_of(config)) if config.with_suffix(".log").exists() else 0
    process = small_run.start(config, *overrides)
    looked = lambda: "the trained part marked" in small_run.log_of(config)[before:]  # noqa: E731
    assert small_run.wait_for(process, looked)
    process.send_signal(signal.SIGSTOP)
    return process


@pytest.mark.parametrize("state", ["new", "unfinished"])
def test_a_run_beside_one_that_has_looked_is_refused(
    again, run: Path, finished: Path, tmp_path: Path, state: str
):
    """Between its look and its first write another would finish, and be overwritten."""
    if state == "new":
        shutil.rmtree(run)
    else:
        unfinish(run)
    first = waits_to_write(finished, f"output_dir={run}")
    before = small_run.states(run)
    message = refused(again)
    assert "in which another process is training, expected none" in message
    assert f"({run}/.dsjax.lock is held by process {first.pid} of host " in message
    assert small_run.states(run) == before
    first.send_signal(signal.SIGCONT)
    assert first.wait(120) == 0
    assert (run / "export").is_dir() and list(run.glob(".*")) == []


def test_an_export_that_came_meanwhile_is_not_replaced(
    again, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"

    def another_writes(*arguments: Any) -> Any:
        (shutil.copytree(run / "export", out) / MANIFEST).write_text('{"run": "another"}')
        return card_facts(*arguments)

    (run / "eval_results.json").unlink()
    monkeypatch.setattr("dsjax.export.run.card_facts", another_writes)
    assert "export of another run" in refused(again, f"export.path={out}")
    assert (out / MANIFEST).read_text() == '{"run": "another"}'


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
    "adapter.r": "8",
    "model.dtype": "bfloat16",
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_configuration_is_refused(again, run: Path, finished: Path, key: str):
    before = small_run.states(run)
    message = refused(again, f"{key}={CHANGES[key].format(folder=finished.parent)}")
    assert message.startswith("output_dir: got ") and f"with other {key}, expected" in message
    assert small_run.states(run) == before


def test_the_same_contents_may_lie_elsewhere(again, run: Path, finished: Path, tmp_path: Path):
    """Moved to another disk, with a config.json that was saved again by another version."""
    unfinish(run)
    moved = shutil.copytree(finished.parent / "model", tmp_path / "elsewhere")
    told = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(told | {"transformers_version": "9"}))
    rows = shutil.copy(finished.parent / "train.jsonl", tmp_path / "rows.jsonl")
    said = again(f"model.path={moved}", f"data.train={rows}", "data.overlong=error")
    assert f"resuming after step 10 of {TOTAL}" in said


def test_what_changes_no_number_may_change(again, run: Path, finished: Path):
    """Above all what troubleshooting.md advises to a run that is out of memory."""
    unfinish(run)
    said = again(
        *("training.gradient_accumulation_steps=1", "training.gradient_checkpointing=full"),
        *("training.eval_steps=4", f"data.eval={finished.parent / 'train.jsonl'}"),
    )
    assert f"resuming after step 10 of {TOTAL}" in said
    losses = [row["loss"] for row in small_run.metrics(run) if "loss" in row]
    original = [row["loss"] for row in small_run.metrics(finished.parent / "run") if "loss" in row]
    assert losses == pytest.approx(original, rel=LOSS_BOUND)


def test_more_epochs_go_on(again, run: Path):
    said = again("training.max_steps=null", "training.num_train_epochs=7")
    assert f"resuming after step {TOTAL} of " in said


def change_a_number(model: Path, of: Callable[[str], bool]) -> None:
    """Turn over one bit of one number of a checkpoint."""
    file = next(model.glob("*.safetensors"))
    _, infos = read_header(file)
    info = next(info for info in infos if of(info.name))
    content = bytearray(file.read_bytes())
    content[info.end - 2] ^= 1
    file.write_bytes(content)


def test_other_weights_of_the_same_shapes_are_refused(
    again, run: Path, finished: Path, tmp_path: Path
):
    other = shutil.copytree(finished.parent / "model", tmp_path / "other")
    change_a_number(other, lambda name: "mlp" in name)
    unfinish(run)
    before = small_run.contents(run)
    message = refused(again, f"model.path={other}")
    assert message.startswith("model.path: got other contents (")
    assert small_run.contents(run) == before
    words = [f"model.path={other}", f"output_dir={run}"]
    for command in (
        lambda: evaluate.main(["--config", str(finished), *words]),
        lambda: export.main(["--run", str(run), "--out", f"{tmp_path}/out", "--format", "merged"]),
    ):
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace(f"{finished.parent}/model", str(other)))
        with pytest.raises(ConfigError, match=r"^model\.path: got other contents \("):
            command()
        (run / "config.yaml").write_text(text)
    assert not (tmp_path / "out").exists()


def test_a_changed_number_beside_the_sample_is_found_on_the_devices(
    again, run: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Large checkpoints are sampled before they are read; what is read is compared whole."""
    other = shutil.copytree(finished.parent / "model", tmp_path / "other")
    change_a_number(other, lambda name: "mlp" in name)
    unfinish(run)
    recorded = restored_meta(run)["contents"]["model.path"]
    monkeypatch.setattr(setup, "source_digest", lambda source: recorded)
    message = refused(again, f"model.path={other}")
    assert message.startswith("model.path: got a checkpoint whose ") and ".mlp." in message
    assert "expected the same weights" in message


def test_an_adapter_may_be_moved_and_not_be_another(
    again, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """What the adapter says and holds counts, not where it lies nor by whom it was saved."""
    again("export.format=peft")
    adapter, second = shutil.copytree(run / "export", tmp_path / "adapter"), tmp_path / "second"
    words = [f"output_dir={second}", "data.eval=null", "training.eval_steps=null"]
    assert again(f"adapter.path={adapter}", "training.max_steps=2", *words)
    moved = Path(shutil.move(adapter, tmp_path / "elsewhere"))
    settings = json.loads((moved / "adapter_config.json").read_text())
    before = small_run.contents(second)
    for change in ("a number", "a setting"):
        other = shutil.copytree(moved, tmp_path / change.replace(" ", "_"))
        if change == "a number":
            change_a_number(other, lambda name: "lora_B" in name)
        else:
            text = json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]})
            (other / "adapter_config.json").write_text(text)
        message = refused(again, f"adapter.path={other}", "training.max_steps=3", *words)
        assert message.startswith("adapter.path: got other contents ("), message
        assert small_run.contents(second) == before
    targets = settings["target_modules"][::-1]  # PEFT saves a set
    saved_again = {"peft_version": "9.9", **settings, "base_model_name_or_path": "/elsewhere"}
    saved_again["target_modules"] = targets
    (moved / "adapter_config.json").write_text(json.dumps(saved_again, indent=4))
    said = again(f"adapter.path={moved}", "training.max_steps=3", *words)
    assert "resuming after step 2 of 3" in said


def restored_meta(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says of the run."""
    reader = Checkpointer(run / "checkpoints", CheckpointSection(), read_only=True)
    step = reader.latest()
    assert step is not None
    meta = reader.meta(step)
    reader.close()
    return meta


def test_templates_show_the_day_on_which_the_run_began(again, run: Path, monkeypatch):
    """Another day would make other tokens of the same rows, which are refused."""
    days, read = [], run_data.read_data

    def note_day(config: Any, parts: Any, today: datetime) -> Any:
        days.append(today)
        return read(config, parts, today)

    monkeypatch.setattr(run_data, "read_data", note_day)
    again()
    assert days == [datetime.fromisoformat(restored_meta(run)["started"])]


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
    assert message.startswith("data.train: got other contents (")
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


def test_the_export_of_the_same_configuration_on_other_data_is_not_replaced(
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
        assert "which holds the export of another run" in refused(again, f"export.path={out}")
    finally:
        rows.write_text(text)
    assert small_run.contents(out) == before
    assert not run.exists()
