# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json says what PEFT understands, or there is none; it reads back as the same."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from safetensors.numpy import save_file

from dsjax import adapters
from dsjax.adapters import expert_lora, lora, lora_peft
from dsjax.adapters.lora import LoraConfig
from dsjax.config import AdapterSection
from dsjax.errors import ConfigError
from dsjax.models import Model
from dsjax.training.partition import make_partition
from dsjax.weights import peft
from dsjax.weights.adapter import check_params, check_targets, peft_tensors, resolve

SHAPE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
MOE_16B: dict[str, Any] = {
    key: value for key, value in SHAPE.items() if "rank" not in key and "head_dim" not in key
} | {"model_type": "deepseek"}
FEED_FORWARD = ["down_proj", "gate_proj", "up_proj"]


def _model(spec: LoraConfig, shape: dict[str, Any]) -> Model:
    model = tiny_steps.model_of(**shape)
    adapters.attach(model, spec)
    return model


def _spec(targets: str | list[str], **fields: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": targets} | fields))


def _random(model: Model, spec: LoraConfig) -> dict[str, jax.Array]:
    leaves, rng = make_partition(model).leaves, np.random.default_rng(0)
    values = {
        path: np.zeros(leaf.shape, np.float32)
        for path, leaf in leaves.items()
        if leaf.kind == "adapter"
    }
    for path, index in lora.tensors(model, spec).values():
        values[path][index] = rng.normal(size=values[path][index].shape)
    return {path: jnp.asarray(array) for path, array in values.items()}


def _write(directory: Path, model: Model, spec: LoraConfig, **config: Any) -> Path:
    fields = adapters.peft_config(model, spec, "base") | config
    (directory / "adapter_config.json").write_text(json.dumps(fields, sort_keys=True))
    tensors = peft_tensors(model, spec, _random(model, spec))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        (SHAPE, _spec("all-linear", lora_dropout=0.1)),
        (SHAPE, _spec(FEED_FORWARD, layers_to_transform=[2], use_rslora=True)),
        (SHAPE, _spec(["down_proj"], rank_pattern={"layers.1.*": 3, "layers.2.mlp.ex.*": 5})),
        (SHAPE, _spec(r".*\.experts\..*", alpha_pattern={".*(gate|up)_proj": 7})),
        (SHAPE, _spec(["model.layers.0.mlp.up_proj", "o_proj"], layers_to_transform=[2])),
        (MOE_16B, _spec(["experts.3.gate_proj", "v_proj"], rank_pattern={"gate_proj": 3})),
        ({}, _spec(["q_proj"], rank_pattern={"q_proj": 3, "layers.0.self_attn.q_proj": 5})),
    ],
)
def test_what_is_written_is_read(shape: dict[str, Any], spec: LoraConfig, tmp_path: Path) -> None:
    model = _model(spec, shape)
    path = str(_write(tmp_path, model, spec))

    again = resolve(AdapterSection(path=path))

    other = _model(again, shape)
    leaves = make_partition(other).leaves
    check_params(path, other, again, leaves, lambda name: np.zeros(()))
    read = peft.read_params(path, other, again, leaves)
    expected = _random(model, spec)
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[name], values) for name, values in expected.items())
    assert adapters.peft_config(other, again, "base") == adapters.peft_config(model, spec, "base")
    assert make_partition(other).counts() == make_partition(model).counts()


def test_experts_of_moe_16b_keep_names_of_their_own() -> None:
    spec = _spec(["experts.3.gate_proj", "v_proj"])
    model = _model(spec, MOE_16B)
    fields = lora_peft.config_fields(model, spec)
    assert "target_parameters" not in fields
    assert fields["target_modules"] == ["experts.3.gate_proj", "v_proj"]
    names = set(peft_tensors(model, spec, _random(model, spec)))
    assert "base_model.model.model.layers.2.mlp.experts.3.gate_proj.lora_A.weight" in names


def test_patterns_are_written_so_that_their_order_means_nothing() -> None:
    """The file is sorted, and PEFT takes the first pattern that fits."""
    kept = {r"0.self_attn\.q_proj": 5, "q_proj": 3}
    for given, written in (
        (kept, kept),
        ({"q_proj": 3, r"layers\.0\..*": 5}, {r"self_attn\.q_proj": 3}),
    ):
        spec = _spec(["q_proj"], rank_pattern=given)
        assert lora_peft.config_fields(_model(spec, {}), spec)["rank_pattern"] == written


def test_factors_are_by_expert_in_a_and_by_rank_then_expert_in_b() -> None:
    gate, up = (
        (np.full((2, 1, 3), side) + [[[1.0]], [[2]]], np.full((2, 4, 1), side) + [[[1.0]], [[2]]])
        for side in (10, 20)
    )
    a, b = expert_lora.fuse(*expert_lora.stack_gate_up(gate, up))
    np.testing.assert_array_equal(a[:, 0], [11, 21, 12, 22])
    np.testing.assert_array_equal(b[0], [11, 12, 0, 0])
    np.testing.assert_array_equal(b[7], [0, 0, 21, 22])
    taken = expert_lora.split_gate_up(*expert_lora.split(a, b, experts=2))
    for ours, theirs in zip((*gate, *up), (*taken[0], *taken[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


UNEQUAL = r"its experts, or their gate_proj and up_proj, differ in rank or alpha"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_spec(["experts.1.down_proj"]), UNEQUAL),
        (_spec(r".*experts\.\d\.gate_proj"), r"gate_proj and up_proj are not both adapted"),
        (_spec(["gate_proj", "up_proj"], rank_pattern={r"experts\.\d\.up_proj": 3}), UNEQUAL),
        (_spec(["gate_proj", "up_proj"], alpha_pattern={r"experts\.\d\.up_proj": 3}), UNEQUAL),
        (_spec(["down_proj"], rank_pattern={r"experts\.2\.down_proj": 1}), UNEQUAL),
        (_spec(r".*2.mlp.experts.\d.up_proj|.*1.mlp.experts.\d.gate_proj"), UNEQUAL),
    ],
)
def test_what_peft_cannot_hold_is_refused(spec: LoraConfig, reason: str) -> None:
    model = _model(spec, SHAPE)
    said = r"export.format: got peft, expected merged or null; PEFT has one adapter for model\.lay"
    with pytest.raises(ConfigError, match=rf"{said}.*{reason}"):
        adapters.check_form(model, spec, "peft", "export.format")


@pytest.mark.parametrize("parameter", ["experts.gate", "embed_tokens", "mlp.experts.w1"])
def test_other_parameters_are_refused(parameter: str, tmp_path: Path) -> None:
    spec = _spec(["o_proj"])
    folder = _write(tmp_path, _model(spec, SHAPE), spec, target_parameters=[parameter])
    with pytest.raises(ConfigError, match=rf"target_parameters: got '{parameter}', expected names"):
        resolve(AdapterSection(path=str(folder)))


def _resolved(folder: Path, **given: Any) -> LoraConfig:
    section = AdapterSection(path=str(folder), **given)
    spec = resolve(section)
    check_targets(section, spec, tiny_steps.model_of(**SHAPE))
    return spec


def test_the_yaml_may_say_the_same_in_its_own_words(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "target_modules": FEED_FORWARD,
        "rank_pattern": {"down_proj": 3, "up_proj": 2},
        "alpha_pattern": {r"layers\.1\..*": 9},
        "use_rslora": True,
    }
    spec = LoraConfig(r=2, lora_alpha=4, **given)
    folder = _write(tmp_path, _model(spec, SHAPE), spec)
    _resolved(folder, r=2, lora_alpha=4, **given)
    for key, value in (
        ("target_modules", ["gate_proj"]),
        ("rank_pattern", {"down_proj": 2}),
        ("alpha_pattern", {r"layers\.1\..*gate_proj": 9}),
    ):
        with pytest.raises(ConfigError, match=rf"adapter.{key}: got .*the adapter decides"):
            _resolved(folder, **{key: value})


def test_targets_and_exclusions_are_compared_together(tmp_path: Path) -> None:
    given: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}
    spec = LoraConfig(r=2, lora_alpha=4, **given)
    folder = _write(tmp_path, _model(spec, {}), spec)
    section = AdapterSection(path=str(folder), **given)
    check_targets(section, resolve(section), tiny_steps.model_of())
    section = AdapterSection(path=str(folder), target_modules="all-linear")
    with pytest.raises(ConfigError, match=r"adapter.target_modules: got 'all-linear', expected"):
        check_targets(section, resolve(section), tiny_steps.model_of())


def test_dropout_that_the_file_cannot_say_is_the_yamls(tmp_path: Path) -> None:
    spec = _spec(["shared_experts.up_proj"], lora_dropout=0.1)
    folder = _write(tmp_path, _model(spec, SHAPE), spec)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0
    assert _resolved(folder).lora_dropout == 0
    assert _resolved(folder, lora_dropout=0.1).lora_dropout == 0.1


@pytest.mark.parametrize(
    ("shape", "spec", "said"),
    [
        ({}, _spec(["q_proj"], r=3, rank_pattern={"q_proj": 5}), "at least 5; that was not tried"),
        ({}, _spec(["q_proj"], init_lora_weights="olora"), "at least 4; that was not tried"),
        ({}, _spec(["q_proj"], use_dora=True), "refuses DoRA: export merged weights"),
        (tiny_steps.V3, _spec(["kv_b_proj"]), "does not apply it (its issue 48974)"),
        (tiny_steps.V3, _spec(["kv_a_proj_with_mqa"]), "and so does transformers"),
        (tiny_steps.V3, _spec(["up_proj", "gate_proj"]), "It is for peft 0.21 and transformers 5"),
    ],
)
def test_the_card_says_who_reads_it(shape: dict[str, Any], spec: LoraConfig, said: str) -> None:
    assert said in lora_peft.readers(tiny_steps.model_of(**shape), spec)
