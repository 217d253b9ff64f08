# SPDX-License-Identifier: Apache-2.0
"""A merged export's config.json says how its router chooses."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_steps

from dsjax.export.router_keys import write_router_keys

V2 = tiny_steps.V3 | {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}


@pytest.mark.parametrize(
    ("shape", "written", "expected"),
    [
        (tiny_steps.V3, {}, {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
        (tiny_steps.V3, {"topk_method": None}, {"topk_method": "noaux_tc"}),
        (V2, {}, {"topk_method": "group_limited_greedy", "scoring_func": "softmax"}),
        ({}, {"hidden_size": 32}, {"hidden_size": 32}),
    ],
    ids=["v3", "null", "v2", "llama"],
)
def test_what_is_left_open_is_named(
    shape: dict[str, Any], written: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written))
    write_router_keys(tmp_path, tiny_steps.model_of(**shape))
    found = json.loads((tmp_path / "config.json").read_text())
    assert expected.items() <= found.items() and written.keys() <= found.keys()
    assert shape or found == written


def test_a_config_that_says_all_keeps_its_bytes(tmp_path: Path) -> None:
    text = '{"scoring_func":  "sigmoid",\n"topk_method":"noaux_tc"}'
    (tmp_path / "config.json").write_text(text)
    write_router_keys(tmp_path, tiny_steps.model_of(**tiny_steps.V3))
    assert (tmp_path / "config.json").read_text() == text
