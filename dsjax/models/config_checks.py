# SPDX-License-Identifier: Apache-2.0
"""Checks of the fields of a config.json that the families have in common.

In: the parsed config.json. Out: a line for every field that is wrong. Not done here: what the
fields mean to a family.

Sizes have upper bounds far above every model's, so that a damaged number is refused before
anything is looped over or multiplied beyond 64 bits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

Config = Mapping[str, Any]

_LARGEST = 2**20
_LARGEST_OF = {
    "vocab_size": 2**24,
    **dict.fromkeys(
        ("max_position_embeddings", "sliding_window", "max_window_layers", "index_topk"), 2**31 - 1
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers"), 2**13
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "num_key_value_heads", "index_n_heads", "head_dim"),
            *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"),
        ),
        2**12,
    ),
    "n_shared_experts": 2**6,
}
"""Field -> the largest size that is taken for one; `_LARGEST` for the others."""

_MOST_EXPERTS = 2**18
"""Routed experts of all layers together."""

_SMALLEST_NUMBER, _LARGEST_NUMBER = 1e-30, 1e30
"""float32 holds the quotients of such numbers."""


def shown(value: Any) -> str:
    """Write a value of a config.json as a message has it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_count(value: Any, least: int = 1) -> TypeGuard[int]:
    """Whether a value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: Any) -> bool:
    """Whether a value is a number > 0 that float32 can compute with; NaN is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and _SMALLEST_NUMBER <= value <= _LARGEST_NUMBER


def count_problems(
    config: Config, required: Sequence[str], optional: Sequence[str], least: int = 1
) -> list[str]:
    """Sizes that are no integers >= `least`; the optional ones may be null or absent."""
    problems = []
    for name in (*required, *optional):
        value, most = config.get(name), _LARGEST_OF.get(name, _LARGEST)
        bound = ""
        if is_count(value, least):
            if value <= most:
                continue
            bound = f" and <= {most}"
        elif value is None and name in optional:
            continue
        null = " or null" if name in optional else ""
        problems.append(
            f"config.json {name}: got {shown(value)}, expected an integer >= {least}{bound}{null}"
        )
    return problems


def expert_problems(config: Config) -> list[str]:
    """More experts than any model has; layers and experts are sizes."""
    experts, layers = config["n_routed_experts"], config["num_hidden_layers"]
    if experts * layers <= _MOST_EXPERTS:
        return []
    return [
        f"config.json n_routed_experts: got {experts} in each of {layers} layers "
        f"(num_hidden_layers), expected at most {_MOST_EXPERTS} in all"
    ]


def only_problems(config: Config, only: Mapping[str, Any]) -> list[str]:
    """Fields that are implemented for one value only (null and absent are that value)."""
    return [
        f"config.json {name}: got {shown(config[name])}, expected {value!r}; other values are "
        f"not implemented for model_type {config['model_type']}"
        for name, value in only.items()
        if config.get(name) is not None and config[name] != value
    ]


def flag_problems(config: Config, flags: Sequence[str]) -> list[str]:
    """Name flags that are neither true nor false nor null."""
    return [
        f"config.json {name}: got {shown(config[name])}, expected true or false"
        for name in flags
        if not isinstance(config.get(name, False), bool | None)
    ]


def number_problems(config: Config, names: Sequence[str]) -> list[str]:
    """Numbers that are not positive; they may be absent, but transformers takes no null either."""
    return [
        f"config.json {name}: got {shown(config[name])}, expected a number > 0"
        for name in names
        if name in config and not is_positive(config[name])
    ]


def head_problems(config: Config) -> list[str]:
    """More heads than dimensions, where a head's size is their quotient."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if heads <= hidden:
        return []
    return [
        f"config.json num_attention_heads: got {heads}, expected at most hidden_size ({hidden})"
    ]


def names_problems(config: Config, field: str, file: str = "config.json") -> list[str]:
    """Say where a list of names is something else; it may be null or absent."""
    value = config.get(field)
    if value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return []
    return [f"{file} {field}: got {shown(value)}, expected a list of names or null"]
