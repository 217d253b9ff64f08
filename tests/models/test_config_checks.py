# SPDX-License-Identifier: Apache-2.0
"""Any config.json is a model that can be built, or is refused by the name of its field."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.errors import ConfigError
from dsjax.models import build, entries_of, family_of
from dsjax.weights.fp8 import read_format

FOLDER = Path(__file__).resolve().parent.parent / "model_configs"
REAL = {file.parent.name: json.loads(file.read_text()) for file in FOLDER.glob("*/config.json")}
REAL["qwen3"] = REAL["r1_distill_qwen_7b"] | {"model_type": "qwen3", "head_dim": 128}
REAL["deepseek_v32"] = REAL["deepseek_r1"] | {
    **{"model_type": "deepseek_v32", "index_n_heads": 64},
    **{"index_head_dim": 128, "index_topk": 2048},
}
REAL["deepseek_moe_16b"] = REAL["deepseek_llm_7b"] | {
    **{"model_type": "deepseek", "n_routed_experts": 64, "n_shared_experts": 2},
    **{"num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1},
    **{"norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1},
}
OPTIONAL = {
    **{"layer_types": None, "max_window_layers": 28, "sliding_window": 4096, "mlp_bias": False},
    **{"use_sliding_window": True, "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
    **{"original_max_position_embeddings": 4096, "rope_parameters": None, "topk_group": 1},
    **{"mlp_layer_types": None, "rope_interleave": True, "num_key_value_heads": None},
    **{"head_dim": None, "rms_norm_eps": 1e-6, "quantization_config": None, "rope_scaling": None},
}
ROPES = [
    {"type": "linear", "factor": 4.0},
    {"rope_type": "default", "rope_theta": 1e4},
    {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 8192, "rope_theta": 5e5},
    },
    {
        **{"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7},
        **{"mscale_all_dim": 0.7, "attention_factor": None, "truncate": True},
        **{"original_max_position_embeddings": 4096, "partial_rotary_factor": None},
    },
]
QUANTISED = {
    **{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"},
    **{
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": ["lm_head"],
    },
}
ABSENT = object()
BAD = [
    *(ABSENT, None, "", "x", "8", [], [1], ["x"], [[]], {}, {"a": 1}, True, False, 0, -1, 1, 7, 8),
    *(2_000_000, 2**31, 2**40, 10**400, -(10**400), 1.5, 2e6, 1e-300, 1e300, -0.0),
    *(math.nan, math.inf, -math.inf, [128], [0, 1], [2**70, 1]),
]


def _changed(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The config with another value, or none, under a key or an inner key."""
    first, *inner = path
    if inner:
        value = _changed(config.get(first) or {}, tuple(inner), value)
    rest = {key: v for key, v in config.items() if key != first}
    return rest if value is ABSENT else rest | {first: value}


def _refusal(config: Mapping[str, Any]) -> str | None:
    """What is said against a config; None if it is a model's."""
    try:
        parsed = family_of(config).parse_config(config)
        read_format(config)
    except ConfigError as error:
        return str(error)
    assert all(math.isfinite(f) and f > 0 for f in parsed.rope.inv_freq)
    assert math.isfinite(parsed.rope.attention_factor)
    return None


def _starts(config: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[tuple[str, ...]]]]:
    """A real config with every kind of inner mapping, and the paths that are worth a change."""
    top = [(key,) for key in {**OPTIONAL, **config}]
    starts = [(dict(config), top)]
    plain = {key: value for key, value in config.items() if not key.startswith("rope_")}
    for rope in ROPES:
        field = "rope_parameters" if "rope_theta" in rope else "rope_scaling"
        starts.append((plain | {field: rope}, [(field, key) for key in rope]))
    quantised = config | {"quantization_config": QUANTISED}
    return [*starts, (quantised, [("quantization_config", key) for key in QUANTISED])]


def _check_all(name: str) -> None:
    assert _refusal(REAL[name]) is None
    for start, paths in _starts(REAL[name]):
        for path in paths:
            for value in BAD:
                said = _refusal(_changed(start, path, value))
                assert said is None or (path[-1] in said and len(said) < 1_000), (path, value, said)


FAST = ("r1_distill_llama_8b",)


@pytest.mark.parametrize("name", FAST)
def test_every_wrong_value_of_every_field_is_refused_by_its_name(name: str):
    _check_all(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REAL.keys() - set(FAST)))
def test_every_wrong_value_of_every_field_of_the_others_is_refused_by_its_name(name: str):
    _check_all(name)


@pytest.mark.parametrize(
    ("name", "path", "value", "part"),
    [
        ("deepseek_llm_7b", ("num_hidden_layers",), 2_000_000, "an integer >= 1 and <= 8192"),
        ("deepseek_r1", ("num_hidden_layers",), 2_000_000, "an integer >= 1 and <= 8192"),
        ("deepseek_r1", ("vocab_size",), 2**40, "an integer >= 1 and <= 16777216"),
        ("deepseek_r1", ("n_routed_experts",), 8192, "n_routed_experts: got 8192 in each of 61"),
        ("deepseek_r1", ("rms_norm_eps",), None, "rms_norm_eps: got None, expected a number > 0"),
        ("deepseek_llm_7b", ("rms_norm_eps",), math.nan, "rms_norm_eps: got nan"),
        (
            "deepseek_llm_7b",
            ("max_position_embeddings",),
            None,
            "max_position_embeddings: got None",
        ),
        ("deepseek_llm_7b", ("model_type",), [], "config.json model_type: got []"),
        ("r1_distill_qwen_7b", ("layer_types",), 5, "config.json layer_types: got 5"),
        ("deepseek_r1", ("mlp_layer_types",), 5, "config.json mlp_layer_types: got 5"),
        ("deepseek_r1", ("rope_scaling", "rope_type"), "x", "config.json rope_scaling.rope_type"),
        ("deepseek_r1", ("rope_scaling", "type"), 3, "config.json rope_scaling.rope_type: got 3"),
        ("deepseek_r1", ("rope_scaling", "beta_fast"), "32", "rope_scaling.beta_fast: got '32'"),
        ("deepseek_r1", ("rope_scaling", "truncate"), "no", "rope_scaling.truncate: got 'no'"),
        ("deepseek_r1", ("rope_theta",), 0, "config.json rope_theta: got 0"),
        ("deepseek_r1", ("rope_theta",), 1, "config.json rope_theta: got 1, expected a number > 1"),
        (
            *("deepseek_r1", ("quantization_config", "quant_method"), ABSENT),
            "config.json quantization_config.quant_method: got None, expected 'fp8'",
        ),
        ("deepseek_r1", ("quantization_config",), "", "config.json quantization_config: got ''"),
        (
            *("deepseek_r1", ("quantization_config", "scale_fmt"), 3),
            "config.json quantization_config.scale_fmt: got 3, expected 'ue8m0' or null",
        ),
        (
            *("deepseek_r1", ("quantization_config", "modules_to_not_convert"), "lm_head"),
            "modules_to_not_convert: got 'lm_head', expected a list of names or null",
        ),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_value_is_said_in_words(name: str, path: tuple[str, ...], value: Any, part: str):
    assert part in (_refusal(_changed(REAL[name], path, value)) or "")


def test_an_absent_number_is_the_reference_class_default():
    bare = {k: v for k, v in REAL["r1_distill_qwen_7b"].items() if k != "max_position_embeddings"}
    assert family_of(bare).parse_config(bare).max_position_embeddings == 32768
    bare["rope_scaling"] = {"type": "yarn", "factor": 4.0}
    assert family_of(bare).parse_config(bare).max_position_embeddings == 32768


PLACES = {
    name: [(start, path) for start, paths in _starts(config) for path in paths]
    for name, config in REAL.items()
}
VALUES = st.sampled_from(BAD) | st.integers(-1, 300) | st.integers() | st.floats() | st.text()
VALUES |= st.lists(st.integers() | st.text(), max_size=3)


@st.composite
def _changes(draw: st.DrawFn) -> dict[str, Any]:
    """A real config with one to four of its values changed."""
    places = PLACES[draw(st.sampled_from(sorted(PLACES)))]
    config, path = draw(st.sampled_from(places))
    config = _changed(config, path, draw(VALUES))
    for _, (first, *inner) in draw(st.lists(st.sampled_from(places), max_size=3)):
        if not inner:
            config = _changed(config, (first,), draw(VALUES))
    return config


def _is_a_model_or_refused(config: dict[str, Any]) -> None:
    if _refusal(config) is None:
        model = build(config, "bfloat16")
        assert len(entries_of(model)) < 1_000_000


@settings(max_examples=25)
@given(_changes())
def test_any_config_is_a_model_or_refused(config: dict[str, Any]):
    _is_a_model_or_refused(config)


@pytest.mark.slow
@settings(max_examples=300)
@given(_changes())
def test_any_of_many_configs_is_a_model_or_refused(config: dict[str, Any]):
    _is_a_model_or_refused(config)
