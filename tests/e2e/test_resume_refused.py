# SPDX-License-Identifier: Apache-2.0
"""Runs that are not resumed, and of which nothing is touched: other inputs, other numbers, none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import small_run
from begun_run import refused, restored_meta, unfinish

from dsjax import evaluate
from dsjax.errors import ConfigError
from dsjax.export import command as export
from dsjax.training import setup
from dsjax.weights.safetensors import read_header


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_all_differences_are_named(again):
    message = refused(again, "optimizer.learning_rate=0.02", "training.seed=7")
    assert "with other optimizer.learning_rate, training.seed, expected" in message


def test_checkpoints_without_a_config_are_refused(again, run: Path):
    (run / "config.yaml").unlink()
    before = small_run.states(run)
    message = refused(again)
    assert message.startswith("output_dir: got ") and "without config.yaml" in message
    assert small_run.states(run) == before


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
