# SPDX-License-Identifier: Apache-2.0
"""Wrong configuration: the YAML file, overrides, devices and batches, places to write to."""

import os

import pytest
from cli_runner import CliRunner, assert_says

from dsjax.training import reporters

# ---- The YAML file


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        pytest.param(
            "model:",
            "mdoel:",
            ["mdoel: got an unknown key", "did you mean model"],
            id="section_typo",
        ),
        pytest.param(
            "batch_size",
            "batchsize",
            ["training.batchsize: got an unknown key", "did you mean batch_size"],
            id="key_typo",
        ),
        pytest.param(
            "  r: 4",
            "  rank: 4",
            ["adapter.rank: got an unknown key", "expected a key of adapter"],
            id="peft_key",
        ),
        pytest.param(
            "  max_steps: 2",
            "  max_steps: 2\n  r: 8",
            ["training.r: got an unknown key", "did you mean adapter.r?"],
            id="key_of_another_section",
        ),
        pytest.param("  r: 4", "  r: 4\n  r: 8", ["run.yaml:7", "the key r twice"], id="key_twice"),
        pytest.param("  r: 4", "\tr: 4", ["run.yaml:6", "expected valid YAML"], id="tab"),
        pytest.param("LORA", "[LORA", ["run.yaml:", "expected valid YAML"], id="syntax"),
        pytest.param(
            "  r: 4",
            "  r: '4'",
            ['adapter.r: got "4"', "expected an integer >= 1"],
            id="number_as_text",
        ),
        pytest.param(
            "batch_size: 8",
            "batch_size: 8.5",
            ["training.batch_size: got 8.5", "an integer >= 1"],
            id="half_row",
        ),
        pytest.param(
            "batch_size: 8",
            "batch_size: yes",
            ["training.batch_size: got true", "an integer >= 1"],
            id="truth",
        ),
        pytest.param(
            "batch_size: 8",
            "batch_size:",
            ["training.batch_size: got null", "an integer >= 1"],
            id="empty_value",
        ),
        pytest.param(
            "training:\n",
            "training: fast\nx:\n",
            ['training: got "fast"', "a mapping of keys"],
            id="section_as_text",
        ),
    ],
)
def test_a_wrong_yaml_file(cli_runner: CliRunner, old: str, new: str, parts: list[str]):
    cli_runner.edit_yaml(old, new)
    assert_says(cli_runner.refusal(), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(
            "", ["run.yaml: got an empty file", "expected sections such as `model:`"], id="empty"
        ),
        pytest.param("# later\n", ["run.yaml: got an empty file"], id="comment"),
        pytest.param("- model\n", ["run.yaml: got list", "expected sections"], id="list"),
        pytest.param(
            "model: {path: x}\n",
            ["data.train: got nothing", "output_dir: got nothing"],
            id="missing_section",
        ),
        pytest.param(
            "model:\ndata:\noutput_dir: r\n",
            ["model.path: got nothing", "data.train: got nothing"],
            id="empty_sections",
        ),
    ],
)
def test_a_yaml_file_that_holds_no_run(cli_runner: CliRunner, text: str, parts: list[str]):
    cli_runner.yaml.write_text(text)
    assert_says(cli_runner.refusal(), *parts)


def test_a_yaml_file_of_other_bytes(cli_runner: CliRunner):
    cli_runner.yaml.write_bytes(b"model: \xff\xfe")
    assert_says(
        cli_runner.refusal(), "run.yaml: got bytes that are not UTF-8", "expected a YAML file"
    )


# ---- Overrides


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["training.max_steps"],
            ["training.max_steps: got a word without `=`", "expected section.key=value"],
        ),
        (
            ["--training.max_steps=3"],
            ["--training.max_steps: got an unknown option", "section.key=value"],
        ),
        (
            ["training.max_stesp=3"],
            ["training.max_stesp: got an unknown key", "did you mean max_steps"],
        ),
        (
            ["trainig.max_steps=3"],
            ["trainig.max_steps: got an unknown section", "training.max_steps?"],
        ),
        (
            ["max_steps=3"],
            ["max_steps: got an unknown section", "did you mean training.max_steps?"],
        ),
        (["training={max_steps: 3}"], ["training: got a whole section"]),
        (
            ["adapter.target_modules=[q_proj"],
            ["adapter.target_modules: got [q_proj", "written as YAML"],
        ),
        (["--config", "two.yaml"], ["--config: got", "two.yaml", "expected one YAML file"]),
        (["training.max_steps=-1"], ["training.max_steps: got -1", "an integer >= 1 or null"]),
        (["training.num_train_epochs=0"], ["training.num_train_epochs: got 0", "a number > 0"]),
        (["optimizer.learning_rate=-1e-4"], ["optimizer.learning_rate: got -0.0001", ">= 0"]),
        (
            ["optimizer.learning_rate=.inf"],
            ["optimizer.learning_rate: got Infinity", "a number >= 0"],
        ),
        (
            ["optimizer.learning_rate=fast"],
            ['optimizer.learning_rate: got "fast"', "a number >= 0"],
        ),
        (["optimizer.optim=sgd"], ['optimizer.optim: got "sgd"', "expected adamw or lion"]),
        (["optimizer.warmup_ratio=3"], ["optimizer.warmup_ratio: got 3", "<= 1"]),
        (
            ["optimizer.lr_scheduler_type=poly"],
            ['got "poly"', "cosine, cosine_with_min_lr, cosine_with_restarts, linear"],
        ),
        (["adapter.lora_dropout=1"], ["adapter.lora_dropout: got 1", "< 1"]),
        (["adapter.r=0"], ["adapter.r: got 0", "an integer >= 1"]),
        (
            ["adapter.peft_type=lora"],
            ['adapter.peft_type: got "lora"', "LORA, IA3, PREFIX_TUNING or null"],
        ),
        (["adapter.peft_type=ADALORA"], ["adapter.peft_type", "which is not built yet"]),
        (["adapter.peft_type=BOTTLENECK"], ["adapter.peft_type", "which is not built yet"]),
        (["adapter.use_dora=1"], ["adapter.use_dora: got 1, expected true or false"]),
        (
            ["model.quantization=fp8"],
            [
                "model.quantization: got fp8 for a checkpoint that is not in FP8",
                "int8, nf4 or null",
            ],
        ),
        (
            ["model.quantization=nf4", "adapter.peft_type=null"],
            ["model.quantization: got nf4 without an adapter", "set adapter.peft_type"],
        ),
        (["model.dtype=fp16"], ['model.dtype: got "fp16"', "bfloat16, float32 or float16"]),
        (["data.format=chatml"], ['data.format: got "chatml"', "messages, sharegpt, alpaca"]),
        (["data.max_length=1"], ["data.max_length: got 1", "an integer >= 2"]),
        (["data.train=[]"], ["data.train: got []", "not empty"]),
        (["training.seed=-1"], ["training.seed: got -1", ">= 0"]),
        (["training.eval_steps=5"], ["training.eval_steps: got 5 without data.eval"]),
        (
            ["training.gradient_checkpointing=true"],
            ["gradient_checkpointing: got true", "auto, none, dots, names or full"],
        ),
        (["checkpoint.save_steps=0"], ["checkpoint.save_steps: got 0", "an integer >= 1"]),
        (["logging.report_to=mlflow"], ["logging.report_to: got", "mlflow", "tensorboard"]),
        (["export.push_to_hub=tiny"], ["got 'tiny', expected organization/name"]),
        (
            ["export.format=null", "export.push_to_hub=me/tiny"],
            ["export.push_to_hub: got 'me/tiny' with export.format null", "expected null"],
        ),
        (["output_dir=7"], ["output_dir: got 7", "text; put it in quotes"]),
    ],
    ids=lambda value: value[-1] if value and "=" in value[-1] else None,
)
def test_a_wrong_override(cli_runner: CliRunner, words: list[str], parts: list[str]):
    assert_says(cli_runner.refusal(*words), *parts)


def test_a_tracker_that_is_not_installed(cli_runner: CliRunner, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporters, "find_spec", lambda name: None)
    message = cli_runner.refusal("logging.report_to=[tensorboard, wandb]")
    assert_says(message, "got wandb, which is not installed", "pip install wandb")


def test_a_push_without_a_hub(cli_runner: CliRunner):
    message = cli_runner.refusal("export.push_to_hub=me/tiny")
    assert_says(message, "export.push_to_hub: got 'me/tiny', expected a token", "hf auth login")


def test_all_wrong_keys_are_named_at_once(cli_runner: CliRunner):
    message = cli_runner.refusal("adapter.r=0", "training.seed=-1", "optimizer.optim=sgd")
    assert_says(message, "adapter.r: got 0", "training.seed: got -1", 'optimizer.optim: got "sgd"')


def test_a_configuration_file_that_is_not_there(cli_runner: CliRunner):
    cli_runner.yaml = cli_runner.folder / "nowhere.yaml"
    assert_says(cli_runner.refusal(), "nowhere.yaml: got No such file", "expected a YAML file")


# ---- Devices, batches, places to write to


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["mesh.data=3"], ["mesh: got data 3", "the number of devices (8)"]),
        (["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=1"], ["mesh: got data 2, fsdp 2", "(8)"]),
        (["mesh.data=-1"], ["mesh.data and mesh.fsdp: got -1", "expected -1 on one axis"]),
        (["mesh.data=0"], ["mesh.data: got 0", "-1 or an integer >= 1"]),
        (
            ["mesh.fsdp=1", "mesh.sequence=8", "data.max_length=24"],
            ["data.max_length: got 24", "a multiple of 16 = 2 x mesh.sequence (8)", "32 would do"],
        ),
        (
            ["training.batch_size=12"],
            ["training.batch_size: got 12", "a multiple of 8", "16 would do"],
        ),
        (
            ["training.gradient_accumulation_steps=3"],
            ["training.batch_size: got 8", "training.gradient_accumulation_steps (3)"],
        ),
        (
            ["training.gradient_accumulation_steps=2"],
            ["training.batch_size: got 8", "a multiple of 16", "mesh.fsdp"],
        ),
    ],
    ids=lambda value: value[-1] if value and "=" in value[-1] else None,
)
def test_devices_and_batches_that_do_not_fit(
    cli_runner: CliRunner, words: list[str], parts: list[str]
):
    assert_says(cli_runner.refusal(*words), *parts)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("optimizer.warmup_steps=2", ["warmup_steps: got 2 in a run of 2 steps", "expected fewer"]),
        ("optimizer.learning_rate=0", ["learning_rate: got 0.0", "no step would change a weight"]),
    ],
)
def test_a_run_that_would_change_nothing(cli_runner: CliRunner, word: str, parts: list[str]):
    assert_says(cli_runner.refusal(word), *parts)


def test_an_output_directory_that_is_a_file(cli_runner: CliRunner):
    cli_runner.run.write_text("notes")
    assert_says(
        cli_runner.refusal(), f"output_dir: got the file {cli_runner.run}", "expected a folder"
    )
    assert cli_runner.run.read_text() == "notes"


def test_an_output_directory_under_a_file(cli_runner: CliRunner):
    message = cli_runner.refusal(f"output_dir={cli_runner.rows}/run")
    assert_says(
        message, "output_dir: got", f"under the file {cli_runner.rows}", "expected a folder"
    )


def test_an_export_folder_of_somebody_else(cli_runner: CliRunner):
    other = cli_runner.folder / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("")
    message = cli_runner.refusal(f"export.path={other}")
    assert_says(message, f"export.path: got '{other}'", "not empty", "expected a new folder")


def test_another_run_in_the_output_directory(cli_runner: CliRunner):
    other = cli_runner.folder / "other"
    other.mkdir()
    (other / "config.yaml").write_text(cli_runner.yaml.read_text().replace("r: 4", "r: 5"))
    (other / "metrics.jsonl").write_text('{"step": 3, "train_loss": 2.0}\n')
    message = cli_runner.refusal(f"output_dir={other}")
    assert_says(message, "output_dir: got", "other adapter.r", "choose another output_dir")
    assert sorted(file.name for file in other.iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_something_else_in_the_output_directory(cli_runner: CliRunner):
    other = cli_runner.folder / "other"
    other.mkdir()
    (other / "config.yaml").write_text("site: {title: my page}\n")
    message = cli_runner.refusal(f"output_dir={other}")
    assert_says(message, f"output_dir: got '{other}'", "config.yaml is not one that a run wrote")
    assert_says(message, "site: got an unknown key", "choose another output_dir")


@pytest.mark.parametrize(
    ("name", "says"),
    [("model", "which lies in model.path ("), ("run", "in which output_dir (")],
)
def test_the_export_in_place_of_what_the_run_needs(cli_runner: CliRunner, name: str, says: str):
    out = cli_runner.folder / name
    message = cli_runner.refusal(f"export.path={out}")
    assert_says(message, f"export.path: got '{out}', {says}'{out}'")


def test_an_export_folder_under_a_file(cli_runner: CliRunner):
    message = cli_runner.refusal(f"export.path={cli_runner.rows}/out")
    assert_says(
        message, "export.path: got", f"under the file {cli_runner.rows}", "expected a folder"
    )


def test_a_folder_that_may_not_be_written(cli_runner: CliRunner, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    message = cli_runner.refusal()
    assert_says(
        message, "output_dir: got", "expected a folder", f"{cli_runner.folder} is read-only"
    )


def test_a_tilde_is_the_home_directory(cli_runner: CliRunner, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(cli_runner.folder))
    (cli_runner.folder / "taken").write_text("")
    message = cli_runner.refusal("output_dir=~/taken")
    assert_says(message, f"output_dir: got the file {cli_runner.folder}/taken")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["adapter.peft_type=PREFIX_TUNING", "export.format=merged"],
            ['export.format: got "merged" with PREFIX_TUNING', "a prefix has no merged form"],
        ),
        (
            ["adapter.peft_type=null", "export.format=peft"],
            ['export.format: got "peft" without an adapter', "expected merged or null"],
        ),
        (["export.format=gguf"], ['export.format: got "gguf"', "merged, peft or null"]),
    ],
    ids=["merged_prefix", "peft_without_adapter", "unknown"],
)
def test_an_export_that_does_not_exist(cli_runner: CliRunner, words: list[str], parts: list[str]):
    assert_says(cli_runner.refusal(*words), *parts)
