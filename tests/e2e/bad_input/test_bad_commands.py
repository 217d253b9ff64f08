# SPDX-License-Identifier: Apache-2.0
"""The commands as processes of their own: exit 2, one message, no traceback. Export and convert."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from desk import Desk, assert_says

from dsjax.errors import ConfigError
from dsjax.export import command as export
from dsjax.weights.convert import to_flax, to_hf

ROOT = Path(__file__).resolve().parents[3]


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The process ended with exit code 2 and one message, and printed nothing else."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert_says(done.stderr, *parts)


@pytest.mark.parametrize(
    ("spoil", "words", "parts"),
    [
        (lambda desk: desk.edit_yaml("r: 4", "rank: 4"), [], ["adapter.rank: got an unknown key"]),
        (
            lambda desk: (desk.model / "model-00002-of-00004.safetensors").unlink(),
            [],
            ["model.path: got", "without model-00002-of-00004.safetensors"],
        ),
        (lambda desk: desk.write_rows("{"), [], ["rows.jsonl:1: got a line that is not JSON"]),
        (lambda desk: None, ["mesh.data=3", "mesh.fsdp=1"], ["mesh: got data 3", "devices (1)"]),
        (
            lambda desk: desk.write_adapter(use_dora=True),
            [],
            ["adapter_config.json use_dora: got True"],
        ),
        (
            lambda desk: desk.edit_yaml(f"{desk.run}", f"{desk.model}/run"),
            [],
            ["output_dir: got", "model/run', which lies in model.path (", "a folder outside of it"],
        ),
    ],
    ids=["config", "checkpoint", "data", "mesh", "adapter", "output"],
)
def test_training_refuses(
    desk: Desk, run_cli, spoil: Callable[[Desk], None], words: list[str], parts: list[str]
):
    spoil(desk)
    before = sorted(desk.folder.rglob("*"))
    assert_refused(run_cli("train", "--config", desk.yaml, *words), *parts)
    assert sorted(desk.folder.rglob("*")) == before


def test_training_without_a_configuration(run_cli):
    assert_refused(run_cli("train"), "--config: got nothing", "add --config FILE")


def test_converting_refuses(desk: Desk):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "convert_weights.py", "to-hf", desk.model, desk.run],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert_refused(done, "got", str(desk.model), "expected a directory written by to-flax")
    assert not desk.run.exists()


# ---- Conversion


def test_converting_into_a_folder_in_use(desk: Desk):
    for convert in (to_flax, to_hf):
        source = desk.model
        if convert is to_hf:
            source = desk.folder / "flax"
            to_flax(str(desk.model), str(source))
        with pytest.raises(ConfigError, match="got .*model', which is not empty"):
            convert(str(source), str(desk.model))


def test_converting_what_is_not_there(desk: Desk):
    with pytest.raises(ConfigError, match="got '/nowhere', expected a directory or a hub id"):
        to_flax("/nowhere", str(desk.run))
    assert not desk.run.exists()


def test_converting_a_checkpoint_with_another_shape(desk: Desk):
    desk.edit_config(vocab_size=300)
    with pytest.raises(ConfigError, match=r"model.embed_tokens.weight: got shape \[288, 48\]"):
        to_flax(str(desk.model), str(desk.run))
    assert sorted(path.name for path in desk.folder.iterdir()) == [
        "model",
        "rows.jsonl",
        "run.yaml",
    ]


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (
            lambda d: (d / "dsjax_checkpoint.json").write_text("{"),
            ["got invalid JSON in", "dsjax_checkpoint.json", "expected a JSON object"],
        ),
        (lambda d: (d / "dsjax_checkpoint.json").write_text('{"format": 9}'), ["of format 9"]),
        (
            lambda d: [f.unlink() for f in (d / "arrays" / "model.norm.weight").iterdir()],
            ["a damaged", "/arrays/model.norm.weight (", ".zarray", "convert the source again"],
        ),
        (lambda d: (d / "config.json").unlink(), ["with config.json"]),
    ],
    ids=["manifest", "format", "array", "config"],
)
def test_a_damaged_dsjax_checkpoint(desk: Desk, spoil: Callable[[Path], object], parts: list[str]):
    flax = desk.folder / "flax"
    to_flax(str(desk.model), str(flax))
    spoil(flax)
    assert_says(desk.refusal(f"model.path={flax}"), "model.path", *parts)


# ---- Export of a run


def _refused_export(desk: Desk, form: str = "peft", out: str = "out") -> str:
    words = ("--run", desk.run, "--out", desk.folder / out, "--format", form)
    before, message = desk.refused(export.main, *words)
    assert before == ""
    assert not (desk.folder / "out").exists()
    return message


def _make_run(desk: Desk) -> None:
    desk.run.mkdir()
    (desk.run / "config.yaml").write_text(desk.yaml.read_text())


def test_exporting_what_is_no_run(desk: Desk):
    assert_says(_refused_export(desk), "--run: got", "expected the output_dir of a run")


def test_exporting_a_run_without_a_checkpoint(desk: Desk):
    _make_run(desk)
    assert_says(_refused_export(desk), "checkpoints: got no complete checkpoint", "train first")


def test_exporting_over_something_else(desk: Desk):
    _make_run(desk)
    (desk.folder / "thesis").mkdir()
    (desk.folder / "thesis" / "chapter.tex").write_text("")
    assert_says(_refused_export(desk, out="thesis"), "--out: got", "which is not empty")
    assert_says(_refused_export(desk, out="model"), "--out: got", "which lies in model.path")


def test_exporting_an_adapter_of_a_run_without_one(desk: Desk):
    desk.edit_yaml("  peft_type: LORA\n  r: 4\n", "  peft_type: null\n")
    _make_run(desk)
    assert_says(_refused_export(desk), "--format: got peft for a run without an adapter")


def test_exporting_a_prefix_as_merged(desk: Desk):
    desk.edit_yaml("LORA\n  r: 4", "PREFIX_TUNING")
    _make_run(desk)
    assert_says(_refused_export(desk, "merged"), "--format: got merged with PREFIX_TUNING", "peft")
