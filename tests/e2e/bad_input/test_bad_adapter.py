# SPDX-License-Identifier: Apache-2.0
"""Wrong adapters: targets and patterns without a match, PEFT folders that do not fit, freezing."""

from typing import Any

import numpy as np
import pytest
from cli_runner import Q_PROJ, CliRunner, assert_says

FULL = "adapter.peft_type=null"


# ---- Targets


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["adapter.target_modules=[q_prog]"],
            [
                "adapter.target_modules: got 'q_prog'",
                "matches no linear module",
                "did you mean q_proj",
            ],
        ),
        (["adapter.target_modules=[q_proj, query]"], ["adapter.target_modules: got 'query'"]),
        (
            ["adapter.target_modules=q_proj"],
            ["adapter.target_modules: got 'q_proj'", "write a list"],
        ),
        (
            ["adapter.target_modules='(q_proj'"],
            ["adapter.target_modules: got '(q_proj'", "expected a regular expression"],
        ),
        (
            ["adapter.target_modules='.*attn.w.*'"],
            ["adapter.target_modules: got '.*attn.w.*'", "matches no linear module"],
        ),
        (
            ["adapter.target_modules=[embed_tokens]"],
            ["adapter.target_modules: got 'embed_tokens'", "no linear module"],
        ),
        (["adapter.target_modules=[]"], ["adapter.target_modules: got []", "not empty"]),
        (
            ["adapter.layers_to_transform=[0, 3]"],
            ["adapter.layers_to_transform: got [3]", "indices from 0 to 2"],
        ),
        (["adapter.layers_to_transform=[-1]"], ["adapter.layers_to_transform: got [-1]"]),
        (
            ["adapter.layers_to_transform=1", "adapter.target_modules=.*q_proj"],
            ["adapter.layers_to_transform: got it beside a regular expression"],
        ),
        (
            ["adapter.rank_pattern={q_prog: 8}"],
            [
                "adapter.rank_pattern: got 'q_prog'",
                "matches no adapted module",
                "did you mean q_proj",
            ],
        ),
        (["adapter.rank_pattern={q_proj: 0}"], ["adapter.rank_pattern: got", "an integer >= 1"]),
        (
            ["adapter.rank_pattern={'(q': 8}"],
            ["adapter.rank_pattern: got '(q'", "expected a regular expression"],
        ),
        (
            ["adapter.alpha_pattern={up_proj: 8}", "adapter.target_modules=[q_proj]"],
            ["adapter.alpha_pattern: got 'up_proj'", "matches no adapted module"],
        ),
        (
            ["adapter.peft_type=PREFIX_TUNING", "adapter.num_virtual_tokens=0"],
            ["adapter.num_virtual_tokens: got 0"],
        ),
    ],
    ids=lambda value: value[0] if value and "=" in value[0] else None,
)
def test_a_target_that_is_not_there(cli_runner: CliRunner, words: list[str], parts: list[str]):
    assert_says(cli_runner.refusal(*words), *parts)


def test_a_tied_head_as_target(cli_runner: CliRunner):
    cli_runner.edit_config(tie_word_embeddings=True)
    cli_runner.edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))
    message = cli_runner.refusal("adapter.target_modules=[q_proj, lm_head]")
    assert_says(message, "adapter.target_modules: got 'lm_head'", "tie_word_embeddings")


def test_keys_of_an_adapter_without_its_kind(cli_runner: CliRunner):
    cli_runner.edit_yaml("  peft_type: LORA\n", "")
    assert_says(
        cli_runner.refusal(), "adapter.peft_type: got nothing beside adapter.r", "expected LORA"
    )


# ---- PEFT's folder


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("{folder}/nowhere", ["adapter.path: got", "nowhere", "expected a PEFT adapter's folder"]),
        ("{rows}", ["adapter.path: got", "rows.jsonl", "expected a PEFT adapter's folder"]),
        ("{model}", ["adapter.path: got", "without adapter_config.json", "found LICENSE"]),
        (
            "someone/adapter",
            ["adapter.path: got 'someone/adapter'", "expected a PEFT adapter's folder"],
        ),
    ],
    ids=["absent", "file", "model", "hub_id"],
)
def test_an_adapter_path_without_an_adapter(cli_runner: CliRunner, path: str, parts: list[str]):
    cli_runner.edit_yaml("  peft_type: LORA\n  r: 4\n", "  path: null\n")
    path = path.format(folder=cli_runner.folder, rows=cli_runner.rows, model=cli_runner.model)
    assert_says(cli_runner.refusal(f"adapter.path={path}"), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"peft_type": "ADALORA"},
            ["peft_type: got 'ADALORA'", "expected LORA or IA3 or PREFIX_TUNING"],
        ),
        ({"peft_type": None}, ["peft_type: got None", "expected LORA"]),
        ({"task_type": "SEQ_CLS"}, ["task_type: got 'SEQ_CLS'", "expected CAUSAL_LM"]),
        ({"use_qalora": True}, ["use_qalora: got True", "not implemented"]),
        ({"bias": "all"}, ["bias: got 'all'", "expected none"]),
        (
            {"modules_to_save": ["lm_head"]},
            ["modules_to_save: got ['lm_head']", "expected it empty"],
        ),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out: got True"]),
        ({"exclude_modules": "(("}, ["exclude_modules: got '(('", "a regular expression"]),
        ({"layers_pattern": "blocks"}, ["layers_pattern: got 'blocks'", "expected layers"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights: got 'pissa'", "expected true"]),
        ({"target_modules": None}, ["target_modules: got nothing", "expected a list"]),
        (
            {"target_modules": ["c_attn"]},
            ["target_modules: got 'c_attn'", "matches no linear module"],
        ),
        ({"r": 0}, ["r: got 0", "an integer >= 1"]),
        ({"r": "8"}, ['r: got "8"', "an integer >= 1"]),
        ({"lora_alpha": "16"}, ['lora_alpha: got "16"', "expected a number > 0"]),
        ({"lora_dropout": 2}, ["lora_dropout: got 2", "a number >= 0 and < 1"]),
        (
            {"rank_pattern": {"v_proj": 4}},
            ["rank_pattern: got 'v_proj'", "matches no adapted module"],
        ),
        (
            {"rank_pattern": {"q_proj": "4"}},
            ['rank_pattern: got {"q_proj": "4"}', "to an integer >= 1"],
        ),
        ({"layers_to_transform": [7]}, ["layers_to_transform: got [7]", "from 0 to 2"]),
        ({"r": 3}, ["q_proj.lora_A.weight: got shape [2, 48], expected [3, 48] for this model"]),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            ["v_proj.lora_A.weight: got no such tensor, expected shape [2, 48]"],
        ),
        (
            {"layers_to_transform": [0, 1]},
            [
                "layers.2.self_attn.q_proj.lora_A.weight: got a tensor",
                "that adapter_config.json does not declare",
            ],
        ),
        ({"peft_type": "PREFIX_TUNING"}, ["num_virtual_tokens: got null", "an integer >= 1"]),
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
            ["prompt_embeddings: got no such tensor", "[4, 144]"],
        ),
    ],
    ids=lambda value: (
        "_".join(f"{k}_{v}" for k, v in value.items()) if isinstance(value, dict) else None
    ),
)
def test_an_adapter_config_that_does_not_fit(
    cli_runner: CliRunner, changes: dict[str, Any], parts: list[str]
):
    cli_runner.write_adapter(**changes)
    assert_says(cli_runner.refusal(), "adapter", *parts)


A1 = Q_PROJ.format(1, "A")


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda t: t.pop(A1), [f"{A1}: got no such tensor", "expected shape [2, 48]"]),
        (
            lambda t: t.update({A1: np.ones((2, 40), "f4")}),
            [f"{A1}: got shape [2, 40], expected [2, 48]"],
        ),
        (
            lambda t: t.update({f"{A1}.x": np.ones(2, "f4")}),
            [f"{A1}.x: got a tensor that adapter_config.json does not declare"],
        ),
        (
            lambda t: t.update({A1.replace("base_model.model.", ""): t.pop(A1)}),
            [f"{A1}: got no such tensor", "did you mean model.layers.1"],
        ),
    ],
    ids=["missing", "shape", "extra", "renamed"],
)
def test_adapter_tensors_that_do_not_fit(cli_runner: CliRunner, edit: Any, parts: list[str]):
    cli_runner.write_adapter(edit)
    assert_says(cli_runner.refusal(), "adapter_model.safetensors", *parts)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        (
            "adapter.r=4",
            ["adapter.r: got 4, expected 2 as in", "adapter_config.json", "remove the key"],
        ),
        ("adapter.lora_alpha=8", ["adapter.lora_alpha: got 8, expected 4"]),
        (
            "adapter.target_modules=[v_proj]",
            ["adapter.target_modules: got ['v_proj'], expected ['q_proj']"],
        ),
        (
            "adapter.peft_type=PREFIX_TUNING",
            ["adapter.peft_type: got 'PREFIX_TUNING', expected 'LORA'"],
        ),
    ],
    ids=["r", "alpha", "targets", "kind"],
)
def test_keys_that_disagree_with_the_adapter_on_disk(
    cli_runner: CliRunner, word: str, parts: list[str]
):
    cli_runner.write_adapter()
    assert_says(cli_runner.refusal(word), *parts)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        (
            "adapter_model.safetensors",
            None,
            ["without adapter_model.safetensors", "safe_serialization"],
        ),
        ("adapter_model.safetensors", "", ["adapter.path", "adapter_model.safetensors", "0 bytes"]),
        ("adapter_config.json", None, ["adapter.path: got", "without adapter_config.json"]),
        ("adapter_config.json", "{", ["adapter.path: got invalid JSON in", "adapter_config.json"]),
        ("adapter_config.json", "[]", ["adapter.path: got a JSON list in", "a JSON object"]),
    ],
    ids=["no_tensors", "empty_tensors", "no_config", "config_json", "config_list"],
)
def test_a_damaged_adapter(cli_runner: CliRunner, name: str, content: str | None, parts: list[str]):
    cli_runner.write_adapter()
    (cli_runner.adapter / name).unlink()
    if content is not None:
        (cli_runner.adapter / name).write_text(content)
    assert_says(cli_runner.refusal(), *parts)


def test_a_prefix_from_disk_as_a_merged_export(cli_runner: CliRunner):
    prefix = np.zeros((4, 144), np.float32)
    cli_runner.write_adapter(
        lambda tensors: (tensors.clear(), tensors.update(prompt_embeddings=prefix)),
        peft_type="PREFIX_TUNING",
        num_virtual_tokens=4,
    )
    message = cli_runner.refusal("export.format=merged")
    assert_says(message, 'export.format: got "merged" with PREFIX_TUNING', "expected peft or null")


# ---- Freezing


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            [FULL, "training.freeze=[embed_token]"],
            ["training.freeze: got 'embed_token'", "matches no tensor", "embed_tokens"],
        ),
        (
            [FULL, "training.freeze=['*.embed*']"],
            ["training.freeze: got '*.embed*'", "expected a regular expression", "write .*"],
        ),
        (
            [FULL, "training.freeze=['layers.[0']"],
            ["training.freeze: got 'layers.[0'", "expected a regular expression"],
        ),
        (
            [FULL, "training.freeze=.*"],
            ["training.freeze: got ['.*'], which freezes every tensor", "at least one left"],
        ),
        (
            ["training.freeze=[embed_tokens]"],
            ["training.freeze: got ['embed_tokens'] with an adapter, expected []"],
        ),
    ],
    ids=["typo", "glob", "syntax", "everything", "with_adapter"],
)
def test_freezing_what_cannot_be_frozen(cli_runner: CliRunner, words: list[str], parts: list[str]):
    assert_says(cli_runner.refusal(*words), *parts)
