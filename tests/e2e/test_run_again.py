# SPDX-License-Identifier: Apache-2.0
"""A finished run started again: what is complete stays as it is, what is missing is made."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_run
import yaml
from begun_run import LOSS_BOUND

from dsjax import train
from dsjax.config import load_config
from dsjax.distributed.processes import Hosts
from dsjax.training.loop import Loop


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


@pytest.mark.slow
def test_an_export_with_a_file_missing_is_made_again(again, run: Path):
    before = small_run.contents(run / "export")
    next((run / "export").glob("*.safetensors")).unlink()
    again()
    assert small_run.contents(run / "export") == before


@pytest.mark.parametrize("kind", ["safetensors", pytest.param("md", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_evaluation_of_another_training_is_not_taken_for_this_one_s(again, run: Path):
    """Checkpoints and export were removed by hand, and the run started anew."""
    text = (run / "eval_results.json").read_text()
    results = json.loads(text)
    (run / "eval_results.json").write_text(json.dumps(results | {"run": "another"}))
    again()
    assert json.loads((run / "eval_results.json").read_text())["run"] == results["run"]


@pytest.mark.slow
def test_another_format_replaces_the_export(again, run: Path):
    again("export.format=peft")
    assert (run / "export" / "adapter_config.json").is_file()
    assert not (run / "export" / "config.json").exists()
    assert "nothing to do" in again("export.format=peft")


class Several(Hosts):
    """A process alone that takes itself for one of two."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def all_gather_text(self, text: str) -> list[str]:
        """Its own text, which all agree on."""
        return [text]


@pytest.mark.slow
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
        if step == self.run.total:
            raise RuntimeError("no such kernel")
        return evaluate_at(self, state, step, *arguments)

    monkeypatch.setattr(Loop, "evaluate", fail_at_the_end)
    with pytest.raises(RuntimeError, match="no such kernel"):
        train.train(load_config(finished, given), Several())
    assert not (run / "export").exists()
    said = re.search("evaluation failed; to leave it out, add (.*)\n", capsys.readouterr().err)
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


def test_kill_between_the_renames_of_an_export(again, run: Path):
    """The old export was moved away, the new one had not come yet."""
    before = small_run.contents(run / "export")
    (run / "export").rename(run / ".export.old")
    shutil.copytree(run / ".export.old", run / ".export.partial")
    again()
    assert small_run.contents(run / "export") == before
    assert not list(run.glob(".export*"))
