# SPDX-License-Identifier: Apache-2.0
"""Expressions of users: the answers of `re`, and an end to those that have none."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import patterns
from dsjax.config.patterns import fullmatch

NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkvo"] + ["lm_head"]
USUAL = [
    *(
        "lm_head",
        "q_proj",
        r"model\.layers\.1\.self_attn\.q_proj",
        ".*",
        ".*q_proj",
        "",
        "^lm_head$",
    ),
    *(
        r".*layers\.(\d|1[01])\.self_attn\.(q|v)_proj",
        r"(?i).*Q_PROJ",
        r".*\.[02468]\..*",
        "x|lm_.*",
    ),
    *(
        r"(?:.*\.)?(?:layers.[01])(?:\..*)?",
        r"(.*\.)?(q_proj)",
        r"(?=model).*(?<!k)_proj",
        "lm.head",
    ),
]


@pytest.mark.parametrize("pattern", USUAL)
def test_an_expression_covers_what_re_covers(pattern: str):
    expected = {name for name in NAMES if re.fullmatch(pattern, name)}
    assert fullmatch([pattern], NAMES) == ({pattern: expected}, {})


@pytest.mark.parametrize("pattern", ["(", "*_proj", "[", r"\1", "(" * 5_000, "a{99999999999}"])
def test_what_is_no_expression_has_a_reason(pattern: str):
    covered, problems = fullmatch([pattern, "lm_head"], NAMES)
    assert list(problems) == [pattern] and problems[pattern]
    assert covered == {"lm_head": {"lm_head"}}


@pytest.mark.parametrize(
    "pattern", [r"([a-z_.\d]+)+X", r"(.*)*X", r"((model|layers|\d|\.|_|[a-z])+)+X"]
)
def test_an_expression_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch, pattern: str):
    monkeypatch.setattr(patterns, "LIMIT_S", 1)
    covered, problems = fullmatch([".*q_proj", pattern], [name * 3 for name in NAMES])
    assert len(covered[".*q_proj"]) == 12
    assert "takes longer than 1 s" in problems[pattern]


PARTS = st.sampled_from([*"qkvo0123.^$|?*+()", ".*", r"\.", r"\d+", "_proj", "layers", "[qv]"])


@pytest.mark.slow
@settings(max_examples=300)
@given(st.lists(PARTS, max_size=8).map("".join))
def test_any_expression_covers_what_re_covers(pattern: str):
    covered, problems = fullmatch([pattern], NAMES)
    if pattern not in problems:
        assert covered[pattern] == {name for name in NAMES if re.fullmatch(pattern, name)}
