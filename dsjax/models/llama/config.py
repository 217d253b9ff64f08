# SPDX-License-Identifier: Apache-2.0
"""Hyper-parameters of a Llama-shaped checkpoint, read from its own config.json.

In: the parsed config.json of model_type llama, qwen2 or qwen3, in the hub's dialect or
transformers 5's. Out: a `LlamaConfig`, or one ConfigError that names every field that is missing,
impossible or would change the numbers in a way the model does not implement.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsjax.errors import raise_all
from dsjax.models.config_checks import (
    count_problems,
    flag_problems,
    head_problems,
    names_problems,
    number_problems,
    only_problems,
    shown,
)
from dsjax.models.rope import Rope, rope_from_config

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_ONLY = {"hidden_act": "silu", "attention_dropout": 0.0}
"""Fields that are implemented for one value only."""

_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}
"""model_type -> what the reference class takes for max_position_embeddings where it is absent."""

_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


@dataclass(frozen=True)
class LlamaConfig:
    """Fields under Hugging Face's names; what differs between the three types is a flag here."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    rope: Rope

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Size of a query's head and of a value's head."""
        return self.head_dim, self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer: how many positions a token looks back over, None for all."""
        return tuple(
            self.sliding_window if kind == "sliding_attention" else None
            for kind in self.layer_types
        )


def parse_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Read a config.json; absent optional fields take the reference class's default.

    Raises:
        ConfigError: with a line for every field that is wrong.
    """
    kind = config["model_type"]
    config = {"max_position_embeddings": _POSITIONS[kind], **config}
    _check(config)
    heads = config["num_attention_heads"]
    # The reference's class defaults: Qwen classes assume 32 kv heads when the key is absent.
    kv_heads = config.get("num_key_value_heads", None if kind == "llama" else 32) or heads
    default_head_dim = 128 if kind == "qwen3" else config["hidden_size"] // heads
    head_dim = config.get("head_dim") or default_head_dim
    attention_bias = bool(config.get("attention_bias", False)) and kind != "qwen2"
    window = config.get("sliding_window", 4096) if _slides(config) else None
    parsed = LlamaConfig(
        model_type=kind,
        **{name: config[name] for name in _SIZES},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config["max_position_embeddings"],
        qkv_bias=attention_bias or kind == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
        qk_norm=kind == "qwen3",
        sliding_window=window,
        layer_types=_layer_types(config, window),
        rope=rope_from_config(config, head_dim),
    )
    _check_parsed(parsed)
    return parsed


def _slides(config: Mapping[str, Any]) -> bool:
    return config["model_type"] != "llama" and bool(config.get("use_sliding_window", False))


def _layer_types(config: Mapping[str, Any], window: int | None) -> tuple[str, ...]:
    layers = config["num_hidden_layers"]
    if config["model_type"] == "llama":
        return ("full_attention",) * layers
    if config.get("layer_types") is not None:
        return tuple(config["layer_types"])
    first = config.get("max_window_layers")
    first = layers if window is None else 28 if first is None else first
    return tuple("sliding_attention" if i >= first else "full_attention" for i in range(layers))


def _check(config: Mapping[str, Any]) -> None:
    sizes = (*_SIZES, "max_position_embeddings")
    problems = [
        *count_problems(config, sizes, ("num_key_value_heads", "head_dim", "sliding_window")),
        *count_problems(config, [], ["max_window_layers"], least=0),
        *only_problems(config, _ONLY),
        *flag_problems(config, _FLAGS),
        *number_problems(config, ["rms_norm_eps"]),
        *names_problems(config, "layer_types"),
    ]
    raise_all(problems)
    raise_all(head_problems(config))


def _check_parsed(config: LlamaConfig) -> None:
    problems = []
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append(
            f"config.json num_key_value_heads: got {config.num_key_value_heads}, expected a "
            f"divisor of num_attention_heads ({config.num_attention_heads})"
        )
    if len(config.layer_types) != config.num_hidden_layers:
        problems.append(
            f"config.json layer_types: got {len(config.layer_types)} entries, expected "
            f"num_hidden_layers ({config.num_hidden_layers})"
        )
    unknown = sorted(set(config.layer_types) - {"full_attention", "sliding_attention"})
    if unknown:
        problems.append(
            f"config.json layer_types: got {shown(unknown)}, expected full_attention or "
            "sliding_attention"
        )
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        problems.append(
            "config.json layer_types: got sliding_attention, expected full_attention only, since "
            "use_sliding_window is false or sliding_window is null; set one of them right"
        )
    raise_all(problems)
