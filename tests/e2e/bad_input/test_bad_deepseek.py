# SPDX-License-Identifier: Apache-2.0
"""Wrong checkpoints of DeepSeek's own architectures: routers, experts, latents, FP8."""

import re
from typing import Any

import pytest
import tiny
import torch
from cli_runner import CliRunner, assert_says
from safetensors.torch import load_file, save_file

EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
SCALE = "model.layers.1.self_attn.o_proj.weight_scale_inv"
LORA = "adapter.target_modules=[o_proj]"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A good FP8 checkpoint of V3's shape."""
    folder = tmp_path_factory.mktemp("bad_v3") / "model"
    return tiny.build_checkpoint(folder, "deepseek_v3_fp8_mtp_hub")


def _edit_tensor(cli_runner: CliRunner, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a tensor, or take it out; the index stays as it is but for its name."""
    for file in sorted(cli_runner.model.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            tensors.pop(name)
            if tensor is not None:
                tensors[name] = tensor
            save_file(tensors, file, metadata={"format": "pt"})
    index = cli_runner.model / "model.safetensors.index.json"
    if tensor is None:
        lines = index.read_text().splitlines(keepends=True)
        index.write_text("".join(line for line in lines if f'"{name}"' not in line))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"n_group": 3}, ["config.json n_group: got 3", "a divisor of n_routed_experts (16)"]),
        ({"n_group": 16}, ["config.json n_group: got 16", "at least 2 of the 16 experts"]),
        ({"n_group": None}, ["config.json n_group: got null", "for topk_method noaux_tc"]),
        ({"topk_group": 5}, ["config.json topk_group: got 5", "at most n_group (4)"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok: got 9", "at most the 8 experts"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok: got 0", "an integer >= 1"]),
        ({"scoring_func": "softmax"}, ["config.json scoring_func: got 'softmax'", "'sigmoid'"]),
        ({"scoring_func": "tanh"}, ["config.json scoring_func: got 'tanh'"]),
        ({"topk_method": "greedy"}, ["config.json topk_method: got 'greedy'", "noaux_tc"]),
        ({"moe_layer_freq": 2}, ["config.json moe_layer_freq: got 2, expected 1"]),
        ({"n_routed_experts": ...}, ["config.json n_routed_experts: got None"]),
        ({"kv_lora_rank": ...}, ["config.json kv_lora_rank: got None", "an integer >= 1"]),
        ({"first_k_dense_replace": -1}, ["first_k_dense_replace: got -1", "an integer >= 0"]),
        ({"first_k_dense_replace": 2}, ["model.layers.1.mlp.gate_proj.weight: got no such tensor"]),
        ({"qk_rope_head_dim": 7}, ["expected an even number for rope"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads: got 2", "num_attention_heads (4)"]),
        ({"routed_scaling_factor": -1}, ["routed_scaling_factor: got -1", "a number > 0"]),
        ({"norm_topk_prob": "yes"}, ["norm_topk_prob: got 'yes'", "true or false"]),
        ({"hidden_act": "gelu"}, ["config.json hidden_act: got 'gelu', expected 'silu'"]),
        ({"q_lora_rank": None}, ["model.layers.0.self_attn.q_proj.weight: got no such tensor"]),
        ({"mlp_layer_types": ["dense"] * 3}, ["config.json mlp_layer_types: got"]),
        ({"model_type": "deepseek_v4"}, ["config.json model_type: got 'deepseek_v4'"]),
        ({"model_type": "deepseek_v32"}, ["config.json index_n_heads: got None"]),
        ({"num_nextn_predict_layers": 0}, ["model.layers.3.", "does not declare"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit(
    cli_runner: CliRunner, changes: dict[str, Any], parts: list[str]
):
    cli_runner.edit_config(**changes)
    assert_says(cli_runner.refusal(LORA), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"weight_block_size": [128, 128]}, ["_scale_inv: got shape", "blocks of 128 x 128"]),
        ({"weight_block_size": 16}, ["quantization_config.weight_block_size: got 16"]),
        ({"quant_method": "awq"}, ["quantization_config.quant_method: got 'awq'"]),
        ({"fmt": "e5m2"}, ["quantization_config.fmt: got 'e5m2'"]),
    ],
)
def test_another_quantisation(cli_runner: CliRunner, changes: dict[str, Any], parts: list[str]):
    section = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    cli_runner.edit_config(quantization_config=section | changes)
    assert_says(cli_runner.refusal(LORA), *parts)


def test_fp8_that_config_json_does_not_tell_of(cli_runner: CliRunner):
    cli_runner.edit_config(quantization_config=...)
    assert_says(cli_runner.refusal(LORA), "got float8_e4m3fn", "no quantization_config")


@pytest.mark.parametrize(
    ("name", "tensor", "parts"),
    [
        (EXPERT, None, [f"{EXPERT}: got no such tensor, expected shape [24, 48]"]),
        (SCALE, None, [f"{SCALE}: got no such tensor, expected shape [3, 3]"]),
        (SCALE, torch.ones(2, 3), [f"{SCALE}: got shape [2, 3], expected [3, 3]"]),
        (
            "model.layers.1.mlp.gate.e_score_correction_bias",
            torch.ones(8),
            ["e_score_correction_bias: got shape [8], expected [16]"],
        ),
    ],
    ids=["expert", "scale", "scale_shape", "bias"],
)
def test_a_tensor_that_is_missing_or_wrong(
    cli_runner: CliRunner, name: str, tensor: Any, parts: list[str]
):
    _edit_tensor(cli_runner, name, tensor)
    assert_says(cli_runner.refusal(LORA), *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["adapter.peft_type=PREFIX_TUNING"], ["got PREFIX_TUNING for model_type deepseek_v3"]),
        (["adapter.target_modules=[q_proj]"], ["target_modules: got 'q_proj'", "q_a_proj"]),
        ([LORA, "mesh.expert=3"], ["mesh: got", "expert 3", "number of devices"]),
    ],
    ids=["prefix", "target", "mesh"],
)
def test_words_that_do_not_fit_the_model(cli_runner: CliRunner, words: list[str], parts: list[str]):
    assert_says(cli_runner.refusal(*words), *parts)


FULL = "adapter.peft_type=null"
AHEAD = "objective.mtp_loss_weight=0.3"
MODULE = "model.layers.3."


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            [LORA, "objective.bias_update_speed=0.001"],
            ["objective.bias_update_speed: got 0.001 with LORA, expected 0; "],
        ),
        ([LORA, AHEAD], ["objective.mtp_loss_weight: got 0.3 with LORA, expected 0; "]),
        ([FULL, "objective.mtp_loss_weight=-1"], ["objective.mtp_loss_weight: got -1"]),
        (
            [FULL, "objective.bias_update_speed=0.1", "training.freeze=[e_score_correction_bias]"],
            ["training.freeze: got ['e_score_correction_bias'], which freezes every"],
        ),
    ],
    ids=["bias", "ahead", "negative", "frozen"],
)
def test_an_objective_that_cannot_be_had(cli_runner: CliRunner, words: list[str], parts: list[str]):
    assert_says(cli_runner.refusal(*words), *parts)


def test_biases_that_the_file_cannot_hold_as_they_move(cli_runner: CliRunner):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    _edit_tensor(cli_runner, name, torch.zeros(16, dtype=torch.bfloat16))
    said = cli_runner.refusal(FULL, "objective.bias_update_speed=0.001")
    assert_says(said, f"{name}: got bfloat16 with objective.bias_update_speed=0.001, expected floa")


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_modules_than_one(cli_runner: CliRunner, count: int):
    cli_runner.edit_config(num_nextn_predict_layers=count)
    said = f"objective.mtp_loss_weight: got 0.3 for config.json num_nextn_predict_layers {count}"
    assert_says(cli_runner.refusal(FULL, AHEAD), said, "one module for multi-token prediction")


def test_a_checkpoint_without_its_module(cli_runner: CliRunner):
    everything = [name for name in _names(cli_runner) if name.startswith(MODULE)]
    for name in everything:
        _edit_tensor(cli_runner, name, None)
    said = cli_runner.refusal(FULL, AHEAD)
    assert_says(said, "objective.mtp_loss_weight: got 0.3, and the checkpoint lacks", MODULE, "...")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["eh_proj.weight", "shared_head.norm.weight", "mlp.gate.weight"])
def test_a_module_that_is_not_whole(cli_runner: CliRunner, name: str):
    _edit_tensor(cli_runner, MODULE + name, None)
    assert_says(
        cli_runner.refusal(FULL, AHEAD), "lacks 1 of the", f"prediction: {MODULE}{name}, expected"
    )


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_that_is_none(cli_runner: CliRunner, name: str):
    _edit_tensor(cli_runner, MODULE + name, torch.ones(288, 48, dtype=torch.bfloat16))
    said = cli_runner.refusal(FULL, AHEAD)
    assert_says(
        said, f"{MODULE}{name}: got a tensor that differs from", "start from the checkpoint"
    )
    _edit_tensor(cli_runner, MODULE + name, torch.ones(9, 48))
    assert_says(
        cli_runner.refusal(FULL, AHEAD), f"{MODULE}{name}: got shape [9, 48], expected [288, 48]"
    )


def test_a_tensor_of_the_module_that_is_not_computed_with(cli_runner: CliRunner):
    index = cli_runner.model / "model.safetensors.index.json"
    known = re.search(rf'"{MODULE}enorm.weight": "(.*?)"', index.read_text())
    assert known is not None
    file = cli_runner.model / known[1]
    added = {MODULE + "enorm.bias": torch.ones(48)}
    save_file(load_file(file) | added, file, metadata={"format": "pt"})
    line = f'"{MODULE}enorm.bias": "{known[1]}",\n    '
    index.write_text(index.read_text().replace(known[0], line + known[0]))
    said = cli_runner.refusal(FULL, AHEAD)
    assert_says(said, f"{MODULE}enorm.bias: got a tensor that config.json does not declare")


def _names(cli_runner: CliRunner) -> list[str]:
    """Names of all tensors but scales."""
    files = sorted(cli_runner.model.glob("*.safetensors"))
    return [name for file in files for name in load_file(file) if not name.endswith("_scale_inv")]
