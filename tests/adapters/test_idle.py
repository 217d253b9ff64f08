# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk that name what a model does not have: loaded as PEFT loads them, and told."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_steps

from dsjax import adapters
from dsjax.adapters import lora
from dsjax.adapters.lora import LoraConfig as OurLoraConfig
from dsjax.config import AdapterSection, patterns
from dsjax.errors import ConfigError
from dsjax.weights import peft
from dsjax.weights.adapter import fitted, resolve

BOMB = r"([a-z_.\d]+)+X"


def _section(folder: Path, **fields: Any) -> AdapterSection:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return AdapterSection(path=str(folder))


def _fitted(folder: Path, shape: dict[str, Any], **fields: Any) -> tuple[Any, str]:
    section, model = _section(folder, **fields), tiny_steps.model_of(**shape)
    spec, told = fitted(section, resolve(section), model)
    adapters.attach(model, spec)
    return spec, told


def test_what_is_not_in_the_model_is_left_out_and_told(tmp_path: Path):
    spec, told = _fitted(
        tmp_path,
        tiny_steps.V3,
        target_modules=["o_proj", "k_proj", "v_proj", "c_attn"],
        layers_to_transform=[0, 99],
        rank_pattern={"k_proj": 2, "o_proj": 8},
        alpha_pattern={"layers.99.o_proj": 2},
        lora_dtype="AUTO",
        something_empty=None,
    )
    assert spec.target_modules == ["o_proj"] and spec.layers_to_transform == [0]
    assert (spec.rank_pattern, spec.alpha_pattern) == ({"o_proj": 8}, {})
    assert told == (
        f"adapter.path {tmp_path}: not in this model: c_attn, k_proj, v_proj, layer 99, "
        "layers.99.o_proj; no fields of PEFT, and not used: lora_dtype"
    )


@pytest.mark.parametrize(
    ("excluded", "kept", "told"),
    [
        (["o_proj", "vision_tower"], ["o_proj"], "vision_tower"),
        ([], None, ""),
        (".*vision_tower.*", None, ".*vision_tower.*"),
        (r".*\.1\..*o_proj", r".*\.1\..*o_proj", ""),
    ],
)
def test_what_is_excluded_and_not_in_the_model_is_left_out(
    tmp_path: Path, excluded: Any, kept: Any, told: str
):
    targets = ["o_proj", "q_b_proj"]
    spec, said = _fitted(tmp_path, tiny_steps.V3, target_modules=targets, exclude_modules=excluded)
    assert spec.exclude_modules == kept
    assert said == (f"adapter.path {tmp_path}: not in this model: {told}" if told else "")


def test_an_adapter_that_fits_is_told_nothing(tmp_path: Path):
    spec, told = _fitted(tmp_path, tiny_steps.V3)
    assert (spec.target_modules, told) == (["o_proj"], "")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"target_modules": ["k_proj"]}, "got 'k_proj', which matches no linear module"),
        ({"target_modules": ["o_proj", "embed_tokens"]}, "got 'embed_tokens', which matches no"),
        ({"target_modules": ["o_proj", "gate"]}, "the experts' router"),
        ({"rank_pattern": {"down_proj": 8}}, "got 'down_proj', which matches no adapted module"),
        ({"layers_to_transform": [99]}, "got [99], expected indices"),
        ({"target_modules": BOMB}, "takes longer than"),
        ({"rank_pattern": {BOMB: 8}}, "takes longer than"),
        ({"target_parameters": "x"}, "target_parameters: got 'x', expected a list of names"),
        ({"target_parameters": [5]}, "target_parameters: got [5], expected a list of names"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_in_the_model_and_has_no_adapter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], part: str
):
    monkeypatch.setattr(patterns, "LIMIT_S", 2)
    with pytest.raises(ConfigError) as refused:
        _fitted(tmp_path, tiny_steps.V3, **fields)
    assert part in str(refused.value)


def test_a_name_in_the_yaml_that_matches_nothing_is_refused():
    model = tiny_steps.model_of(**tiny_steps.V3)
    section = AdapterSection(peft_type="LORA", target_modules=["o_proj", "k_proj"])
    spec, told = fitted(section, resolve(section), model)
    assert told == ""
    with pytest.raises(ConfigError, match="adapter.target_modules: got 'k_proj', which matches no"):
        lora.targets(model, spec)


@pytest.mark.parametrize(
    "start", ["gaussian", "Gaussian", "eva", "orthogonal", "mica", True, False]
)
def test_a_start_that_leaves_the_base_alone_is_a_plain_lora(tmp_path: Path, start: Any):
    spec = resolve(_section(tmp_path, init_lora_weights=start))
    assert spec == OurLoraConfig(4, 8, target_modules=["o_proj"])


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", 5, ["eva"]]
)
def test_a_start_that_changes_the_base_is_refused(tmp_path: Path, start: Any):
    with pytest.raises(ConfigError, match="init_lora_weights: got .*, expected true"):
        resolve(_section(tmp_path, init_lora_weights=start))


def test_every_field_that_peft_writes_is_known(tmp_path: Path):
    from peft import IA3Config, LoraConfig, PrefixTuningConfig

    for config in (
        LoraConfig(target_modules=["o_proj"]),
        PrefixTuningConfig(num_virtual_tokens=4),
        IA3Config(target_modules=["o_proj"], feedforward_modules=[]),
    ):
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        resolve(AdapterSection(path=str(tmp_path)))
        filled = dict.fromkeys(written, 1) | {"peft_type": written["peft_type"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(filled))
        assert peft.unknown_fields(str(tmp_path)) == []
