# SPDX-License-Identifier: Apache-2.0
"""Wrong checkpoints: places without one, damaged files, and configs that do not fit the tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import CliRunner, assert_says

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4665465465465465465465465465465465465465465465465465465465465465\nsize 4\n"
)
SHARD = "model-00002-of-00004.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


# ---- Places


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/nowhere/model", ["model.path: got '/nowhere/model'", "no such directory"]),
        ("{folder}/modle", ["model.path: got", "modle", "expected a directory or a hub id"]),
        ("{model}/config.json", ["got the file", "expected the directory that holds config.json"]),
        ("{folder}", ["model.path: got", "a model directory with config.json", "found rows.jsonl"]),
        ("deepseek-ai/no-such-model", ["model.path: got 'deepseek-ai/no-such-model'", "expected"]),
        ("null", ["model.path: got null", "expected text"]),
    ],
    ids=["absent", "typo", "file", "no_config", "hub_offline", "null"],
)
def test_a_model_path_without_a_model(cli_runner: CliRunner, path: str, parts: list[str]):
    path = path.format(folder=cli_runner.folder, model=cli_runner.model)
    assert_says(cli_runner.refusal(f"model.path={path}"), *parts)


def test_an_adapter_as_the_model(cli_runner: CliRunner):
    cli_runner.write_adapter()
    message = cli_runner.refusal(f"model.path={cli_runner.adapter}")
    assert_says(message, "model.path: got", "PEFT adapter", "adapter.path")


def test_a_revision_of_a_local_directory(cli_runner: CliRunner):
    message = cli_runner.refusal("model.revision=main")
    assert_says(message, "model.revision: got 'main' with the local directory", "expected null")


# ---- Files


def _truncate(model: Path) -> None:
    file = model / SHARD
    file.write_bytes(file.read_bytes()[:-100])


def _in_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        change(index["weight_map"])
        (model / INDEX).write_text(json.dumps(index))

    return spoil


def _without_weights(model: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (_without_weights, ["model.path: got", "without weights", "expected model.safetensors"]),
        (lambda m: (m / SHARD).unlink(), [f"without {SHARD}", f"the 4 files that {INDEX} names"]),
        (lambda m: (m / INDEX).unlink(), ["without an index", f"expected {INDEX}"]),
        (_truncate, [SHARD, "expected", "bytes", "download"]),
        (lambda m: (m / SHARD).write_bytes(b""), [SHARD, "0 bytes"]),
        (
            lambda m: (m / SHARD).write_bytes(b"<html>" * 99),
            [SHARD, "594 bytes", "not safetensors"],
        ),
        (lambda m: (m / SHARD).write_text(POINTER), [SHARD, "git-lfs pointer", "git lfs pull"]),
        (
            lambda m: (m / "tokenizer.json").write_text(POINTER),
            ["tokenizer.json", "git-lfs pointer"],
        ),
        (_in_index(lambda w: w.pop(Q_PROJ)), [Q_PROJ, "expected the index to list every tensor"]),
        (
            _in_index(lambda w: w.update({"model.extra.weight": SHARD})),
            [f"model.extra.weight in {SHARD}", "expected the files to hold what the index lists"],
        ),
        (
            _in_index(lambda w: w.update({Q_PROJ: "../other.safetensors"})),
            ["../other.safetensors", "expected names of .safetensors or .bin files"],
        ),
        (lambda m: (m / INDEX).write_text("{}"), [INDEX, "without a weight_map"]),
        (lambda m: (m / INDEX).write_text("{"), [INDEX, "invalid JSON"]),
        (
            lambda m: shutil.copy(m / SHARD, m / "model.safetensors"),
            ["got model.safetensors", f"only weight files that {INDEX} names"],
        ),
        (lambda m: (m / "config.json").write_text("{,}"), ["config.json", "invalid JSON"]),
        (lambda m: (m / "config.json").write_text("[]"), ["config.json", "got a JSON list"]),
        (lambda m: (m / "config.json").write_text(POINTER), ["config.json", "git-lfs pointer"]),
        (lambda m: (m / "config.json").unlink(), ["expected a model directory with config.json"]),
    ],
    ids=[
        *("no_weights", "no_shard", "no_index", "truncated", "empty_shard", "html", "lfs"),
        *("lfs_tokenizer", "unlisted", "listed_only", "outside", "no_weight_map", "index_json"),
        *("two_saves", "config_json", "config_list", "config_lfs", "no_config"),
    ],
)
def test_damaged_files(cli_runner: CliRunner, spoil: Callable[[Path], Any], parts: list[str]):
    spoil(cli_runner.model)
    assert_says(cli_runner.refusal(), *parts)


def test_a_pickle_that_would_run_code(cli_runner: CliRunner):
    _without_weights(cli_runner.model)
    (cli_runner.model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch run'\ntR.")
    assert_says(cli_runner.refusal(), "model.path", "pytorch_model.bin", "expected")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda m: (m / "tokenizer.json").unlink(), ["got text", "tokenizer.json", "expected"]),
        (lambda m: (m / "tokenizer.json").write_text("{}"), ["model.path: got tokenizer files"]),
        (
            lambda m: (m / "tokenizer_config.json").write_text("{"),
            ["model.path: got invalid JSON in", "tokenizer_config.json", "expected a JSON object"],
        ),
    ],
    ids=["absent", "damaged", "damaged_config"],
)
def test_a_tokenizer_that_is_not_one(
    cli_runner: CliRunner, spoil: Callable[[Path], Any], parts: list[str]
):
    cli_runner.write_rows(*[{"text": "the question"}] * 8)
    spoil(cli_runner.model)
    assert_says(cli_runner.refusal(), *parts)


# ---- Tensors


def _rename(tensors: dict[str, np.ndarray]) -> None:
    tensors[Q_PROJ.replace("q_proj", "qproj")] = tensors.pop(Q_PROJ)


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda t: t.pop(Q_PROJ), [f"{Q_PROJ}: got no such tensor", "expected shape [48, 48]"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight: got no such tensor", "[288, 48]"]),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": np.zeros(48, "f4")}),
            [
                "model.layers.1.self_attn.q_proj.bias: got a tensor",
                "that config.json does not declare",
            ],
        ),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ][:, :40].copy()}),
            [f"{Q_PROJ}: got shape [48, 40], expected [48, 48] from config.json"],
        ),
        (_rename, [f"{Q_PROJ}: got no such tensor", "did you mean", "qproj.weight"]),
        (lambda t: t.clear(), ["model.embed_tokens.weight: got no such tensor"]),
    ],
    ids=["missing", "no_head", "extra", "shape", "renamed", "none"],
)
def test_tensors_that_config_json_does_not_declare(
    cli_runner: CliRunner, edit: Callable, parts: list[str]
):
    cli_runner.edit_tensors(edit)
    assert_says(cli_runner.refusal(), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_hidden_layers": 4}, ["model.layers.3.self_attn.q_proj.weight: got no such tensor"]),
        ({"num_hidden_layers": 2}, ["model.layers.2.", "that config.json does not declare"]),
        (
            {"vocab_size": 300},
            ["model.embed_tokens.weight: got shape [288, 48], expected [300, 48]"],
        ),
        ({"hidden_size": 64}, ["model.norm.weight: got shape [48], expected [64]"]),
        ({"intermediate_size": 96}, ["mlp.up_proj.weight: got shape [80, 48], expected [96, 48]"]),
        ({"num_key_value_heads": 4}, ["k_proj.weight: got shape [24, 48], expected [48, 48]"]),
        ({"attention_bias": True}, ["self_attn.q_proj.bias: got no such tensor"]),
        (
            {"tie_word_embeddings": True},
            [
                "lm_head.weight: got a tensor that differs from model.embed_tokens.weight",
                "set it to false",
            ],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_config_of_another_size(cli_runner: CliRunner, changes: dict[str, Any], parts: list[str]):
    cli_runner.edit_config(**changes)
    assert_says(cli_runner.refusal(), *parts)


def test_an_untied_model_without_a_head(cli_runner: CliRunner):
    cli_runner.edit_config(tie_word_embeddings=False)
    cli_runner.edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))
    assert_says(cli_runner.refusal(), "lm_head.weight: got no such tensor", "tie_word_embeddings")


# ---- config.json


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **settings}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt2"}, ["config.json model_type: got 'gpt2'", "llama, qwen2, qwen3"]),
        ({"model_type": ...}, ["config.json model_type: got None", "expected one of"]),
        ({"hidden_size": ...}, ["config.json hidden_size: got None", "an integer >= 1"]),
        ({"num_hidden_layers": "3"}, ["config.json num_hidden_layers: got '3'", "an integer >= 1"]),
        ({"num_attention_heads": 0}, ["config.json num_attention_heads: got 0"]),
        (
            {"num_key_value_heads": 3},
            ["num_key_value_heads: got 3", "a divisor of num_attention_heads (4)"],
        ),
        ({"num_key_value_heads": "2"}, ["config.json num_key_value_heads: got '2'"]),
        ({"head_dim": 15}, ["config.json head_dim: got 15", "an even number for rope"]),
        ({"hidden_act": "gelu"}, ["config.json hidden_act: got 'gelu'", "expected 'silu'"]),
        ({"attention_dropout": 0.1}, ["config.json attention_dropout: got 0.1", "expected 0.0"]),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            ["config.json quantization_config.quant_method: got 'gptq', expected 'fp8'"],
        ),
        ({"rms_norm_eps": 0}, ["config.json rms_norm_eps: got 0", "> 0"]),
        (
            {"rms_norm_eps": "tiny"},
            ["config.json rms_norm_eps: got 'tiny'", "expected a number > 0"],
        ),
        ({"max_position_embeddings": -1}, ["config.json max_position_embeddings: got -1"]),
        (
            {"tie_word_embeddings": "no"},
            ["config.json tie_word_embeddings: got 'no'", "true or false"],
        ),
        (
            {"rope_parameters": "yarn"},
            ["config.json rope_parameters: got 'yarn'", "a mapping or null"],
        ),
        (
            _rope(rope_type="dynamic", factor=2.0),
            ["rope_parameters.rope_type: got 'dynamic'", "default, linear, llama3, yarn"],
        ),
        (_rope(rope_type="su"), ["rope_parameters.rope_type: got 'su'", "expected one of"]),
        (
            _rope(rope_type="linear"),
            ["rope_parameters.factor: got None", "a number > 0 for rope_type linear"],
        ),
        (_rope(rope_type="yarn", factor=-4), ["rope_parameters.factor: got -4", "a number > 0"]),
        (
            _rope(rope_type="llama3", factor=8.0),
            ["low_freq_factor: got None", "high_freq_factor: got None"],
        ),
        (_rope(partial_rotary_factor=0.5), ["partial_rotary_factor: got 0.5", "expected 1.0"]),
        ({"rope_parameters": {"rope_theta": "1e4"}}, ["rope_parameters.rope_theta: got '1e4'"]),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["config.json rope_scaling.rope_type: got 'dynamic'"],
        ),
        (
            _rope(rope_type="yarn", factor=4.0, beta_fast="x"),
            ["rope_parameters.beta_fast: got 'x'"],
        ),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, dict) else None,
)
def test_a_config_json_that_is_not_supported(
    cli_runner: CliRunner, changes: dict[str, Any], parts: list[str]
):
    cli_runner.edit_config(**changes)
    assert_says(cli_runner.refusal(), *parts)


def test_layer_types_that_do_not_fit(cli_runner: CliRunner):
    cli_runner.edit_config(model_type="qwen2", layer_types=["full_attention"])
    assert_says(
        cli_runner.refusal(), "config.json layer_types: got 1 entries", "num_hidden_layers (3)"
    )


def test_values_that_float16_cannot_hold(cli_runner: CliRunner):
    cli_runner.edit_tensors(lambda tensors: tensors[Q_PROJ].fill(1e6))
    message = cli_runner.refusal("model.dtype=float16", announced=True)
    assert_says(message, f"{Q_PROJ}: got values beyond 65504", "bfloat16 or float32")
