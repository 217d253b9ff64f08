# SPDX-License-Identifier: Apache-2.0
"""Checks of the fields of a config.json that the families have in common.

In: the parsed config.json. Out: a line for every field that is wrong. Not done here: what the
fields mean to a family.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def count_problems(
    config: Config, required: Sequence[str], optional: Sequence[str], least: int = 1
) -> list[str]:
    """Sizes that are no integers >= `least`; the optional ones may be null or absent."""
    problems = [
        f"config.json {name}: got {config.get(name)!r}, expected an integer >= {least}"
        for name in required
        if not is_count(config.get(name), least)
    ]
    return problems + [
        f"config.json {name}: got {config[name]!r}, expected an integer >= {least} or null"
        for name in optional
        if config.get(name) is not None and not is_count(config[name], least)
    ]


def only_problems(config: Config, only: Mapping[str, Any]) -> list[str]:
    """Fields that are implemented for one value only (null and absent are that value)."""
    return [
        f"config.json {name}: got {config[name]!r}, expected {value!r}; other values are "
        f"not implemented for model_type {config['model_type']}"
        for name, value in only.items()
        if config.get(name) is not None and config[name] != value
    ]


def flag_problems(config: Config, flags: Sequence[str]) -> list[str]:
    """Flags that are neither true nor false nor null."""
    return [
        f"config.json {name}: got {config[name]!r}, expected true or false"
        for name in flags
        if not isinstance(config.get(name, False), bool | None)
    ]


def number_problems(config: Config, names: Sequence[str]) -> list[str]:
    """Numbers that are not positive; they may be null or absent."""
    return [
        f"config.json {name}: got {config[name]!r}, expected a number > 0"
        for name in names
        if config.get(name) is not None and not _is_positive(config[name])
    ]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
