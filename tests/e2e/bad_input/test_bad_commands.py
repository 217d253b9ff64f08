# SPDX-License-Identifier: Apache-2.0
"""The commands as processes of their own: exit 2, one message, no traceback. Export and convert."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import CliRunner, assert_says
from clock_lines import without_clocks

from dsjax.errors import ConfigError
from dsjax.export import command as export
from dsjax.weights.convert import to_flax, to_hf

ROOT = Path(__file__).resolve().parents[3]


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The process ended with exit code 2 and one message; before it stands what it was at."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    at, found, _ = f"\n{without_clocks(done.stderr)}".partition("\nerror: ")
    assert found and re.fullmatch(r"(\ndsjax \S+: train .*)?(\nreading rows)?", at), done.stderr
    assert "Traceback" not in done.stderr
    assert_says(done.stderr, *parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words", "parts"),
    [
        (
            lambda cli_runner: cli_runner.edit_yaml("r: 4", "rank: 4"),
            [],
            ["adapter.rank: got an unknown key"],
        ),
        (
            lambda cli_runner: (cli_runner.model / "model-00002-of-00004.safetensors").unlink(),
            [],
            ["model.path: got", "without model-00002-of-00004.safetensors"],
        ),
        (
            lambda cli_runner: cli_runner.write_rows("{"),
            [],
            ["rows.jsonl:1: got a line that is not JSON"],
        ),
        (
            lambda cli_runner: None,
            ["mesh.data=3", "mesh.fsdp=1"],
            ["mesh: got data 3", "devices (1)"],
        ),
        (
            lambda cli_runner: cli_runner.write_adapter(use_qalora=True),
            [],
            ["adapter_config.json use_qalora: got True"],
        ),
        (
            lambda cli_runner: cli_runner.edit_yaml(f"{cli_runner.run}", f"{cli_runner.model}/run"),
            [],
            ["output_dir: got", "model/run', which lies in model.path (", "a folder outside of it"],
        ),
    ],
    ids=["config", "checkpoint", "data", "mesh", "adapter", "output"],
)
def test_training_refuses(
    cli_runner: CliRunner,
    run_cli,
    spoil: Callable[[CliRunner], None],
    words: list[str],
    parts: list[str],
):
    spoil(cli_runner)
    before = sorted(cli_runner.folder.rglob("*"))
    assert_refused(run_cli("train", "--config", cli_runner.yaml, *words), *parts)
    assert sorted(cli_runner.folder.rglob("*")) == before


def test_training_without_a_configuration(run_cli):
    assert_refused(run_cli("train"), "--config: got nothing", "add --config FILE")


def test_converting_refuses(cli_runner: CliRunner):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tools" / "convert_weights.py",
            "to-hf",
            cli_runner.model,
            cli_runner.run,
        ],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert_refused(done, "got", str(cli_runner.model), "expected a directory written by to-flax")
    assert not cli_runner.run.exists()


# ---- Conversion


def test_converting_into_a_folder_in_use(cli_runner: CliRunner):
    for convert in (to_flax, to_hf):
        source = cli_runner.model
        if convert is to_hf:
            source = cli_runner.folder / "flax"
            to_flax(str(cli_runner.model), str(source))
        with pytest.raises(ConfigError, match="got .*model', which is not empty"):
            convert(str(source), str(cli_runner.model))


def test_converting_what_is_not_there(cli_runner: CliRunner):
    with pytest.raises(ConfigError, match="got '/nowhere', expected a directory or a hub id"):
        to_flax("/nowhere", str(cli_runner.run))
    assert not cli_runner.run.exists()


def test_converting_a_checkpoint_with_another_shape(cli_runner: CliRunner):
    cli_runner.edit_config(vocab_size=300)
    with pytest.raises(ConfigError, match=r"model.embed_tokens.weight: got shape \[288, 48\]"):
        to_flax(str(cli_runner.model), str(cli_runner.run))
    assert sorted(path.name for path in cli_runner.folder.iterdir()) == [
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
def test_a_damaged_dsjax_checkpoint(
    cli_runner: CliRunner, spoil: Callable[[Path], object], parts: list[str]
):
    flax = cli_runner.folder / "flax"
    to_flax(str(cli_runner.model), str(flax))
    spoil(flax)
    assert_says(cli_runner.refusal(f"model.path={flax}"), "model.path", *parts)


# ---- Export of a run


def _refused_export(cli_runner: CliRunner, form: str = "peft", out: str = "out") -> str:
    words = ("--run", cli_runner.run, "--out", cli_runner.folder / out, "--format", form)
    before, message = cli_runner.refused(export.main, *words)
    assert without_clocks(before).strip() == ""
    assert not (cli_runner.folder / "out").exists()
    return message


def _make_run(cli_runner: CliRunner) -> None:
    cli_runner.run.mkdir()
    (cli_runner.run / "config.yaml").write_text(cli_runner.yaml.read_text())


def test_exporting_what_is_no_run(cli_runner: CliRunner):
    assert_says(_refused_export(cli_runner), "--run: got", "expected the output_dir of a run")


def test_exporting_a_run_without_a_checkpoint(cli_runner: CliRunner):
    _make_run(cli_runner)
    assert_says(
        _refused_export(cli_runner), "checkpoints: got no complete checkpoint", "train first"
    )


def test_exporting_over_something_else(cli_runner: CliRunner):
    _make_run(cli_runner)
    (cli_runner.folder / "thesis").mkdir()
    (cli_runner.folder / "thesis" / "chapter.tex").write_text("")
    assert_says(_refused_export(cli_runner, out="thesis"), "--out: got", "which is not empty")
    assert_says(_refused_export(cli_runner, out="model"), "--out: got", "which lies in model.path")


def test_exporting_an_adapter_of_a_run_without_one(cli_runner: CliRunner):
    cli_runner.edit_yaml("  peft_type: LORA\n  r: 4\n", "  peft_type: null\n")
    _make_run(cli_runner)
    assert_says(_refused_export(cli_runner), "--format: got peft without an adapter")


def test_exporting_a_prefix_as_merged(cli_runner: CliRunner):
    cli_runner.edit_yaml("LORA\n  r: 4", "PREFIX_TUNING")
    _make_run(cli_runner)
    assert_says(
        _refused_export(cli_runner, "merged"), "--format: got merged with PREFIX_TUNING", "peft"
    )
