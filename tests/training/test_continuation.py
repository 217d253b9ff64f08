# SPDX-License-Identifier: Apache-2.0
"""Which keys may change between two starts of a run: each key is in one list, and is treated so."""

from pathlib import Path
from typing import Any

import pytest

from dsjax.config import RunConfig, rules
from dsjax.training.continuation import (
    BY_CONTENT,
    FREE,
    FREE_SECTIONS,
    LASTING,
    LASTING_SECTIONS,
    differing_keys,
    identity,
)

KEYS = [f"{section}.{key}" for section, inside in rules.keys(RunConfig).items() for key in inside]
BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "output_dir": "o"}


OTHER: dict[str, Any] = {
    "logging.logging_steps": 20,
    "training.gradient_accumulation_steps": 2,
    "model.dtype": "float32",
    "model.param_dtype": "bfloat16",
    "model.quantization": "nf4",
    "adapter.peft_type": "LORA",
    "adapter.layers_to_transform": [1],
    "adapter.feedforward_modules": ["o_proj"],
    "data.eval": ["another"],
    "data.format": "text",
    "data.overlong": "drop",
    "data.column_mapping": {"text": "body"},
    "data.val_size": 5,
    "optimizer.optim": "lion",
    "optimizer.lr_scheduler_type": "linear",
    "optimizer.warmup_steps": 3,
    "training.max_steps": 9,
    "training.gradient_checkpointing": "full",
    "training.eval_steps": 4,
    "checkpoint.save_total_limit": 1,
    "logging.report_to": [],
    "logging.profile_steps": [1, 2],
    "export.format": "peft",
    "export.dtype": "fp8",
    "adapter.loraplus_lr_ratio": 16,
    "adapter.exclude_modules": ["lm_head"],
    "adapter.init_lora_weights": "pissa",
}
ONE_VALUE = ("model.attention", "objective.type")
"""Keys that have but one value yet."""


def other_value(key: str) -> RunConfig:
    """A configuration in which this key alone has another value; rules between keys are left."""
    section, _, name = key.partition(".")
    base = RunConfig.model_validate(BASE)
    now = getattr(getattr(base, section), name)
    by_kind = {bool: lambda: not now, int: lambda: now + 1, float: lambda: now / 2 + 0.25}
    by_kind |= {list: lambda: [*now, "x"], dict: lambda: {"x": 1}}
    other = OTHER[key] if key in OTHER else by_kind.get(type(now), lambda: "another")()
    assert other != now
    part = getattr(base, section).model_copy(update={name: other})
    return base.model_copy(update={section: part})


def test_each_key_is_said_to_stay_or_to_be_free_once():
    assert rules.sections(RunConfig).keys() >= set(FREE_SECTIONS)
    by_section = [k for k in KEYS if k.split(".")[0] in FREE_SECTIONS]
    listed = [*FREE, *BY_CONTENT, *by_section, *LASTING, *_of_lasting_sections()]
    assert sorted(listed) == sorted({*KEYS, "output_dir"})


def _of_lasting_sections() -> list[str]:
    sections = (key for key in KEYS if key.split(".")[0] in LASTING_SECTIONS)
    return [key for key in sections if key not in (*FREE, *BY_CONTENT)]


@pytest.mark.parametrize("key", sorted({*KEYS} - {*ONE_VALUE}))
def test_each_key_is_treated_as_it_is_listed(key: str):
    old, new = RunConfig.model_validate(BASE), other_value(key)
    stays = key in (*LASTING, *_of_lasting_sections())
    assert differing_keys(old, new) == ([key] if stays else [])
    contents = {"model.path": "ab", "data.train": "cd"}
    assert (identity(old, contents) != identity(new, contents)) == stays


def test_a_moved_run_is_the_same_and_other_contents_are_another():
    config = RunConfig.model_validate(BASE)
    moved = RunConfig.model_validate(BASE | {"output_dir": str(Path("elsewhere"))})
    assert differing_keys(config, moved) == []
    assert identity(config, {"a": "1"}) == identity(moved, {"a": "1"})
    assert identity(config, {"a": "1"}) != identity(config, {"a": "2"})
