# SPDX-License-Identifier: Apache-2.0
"""The constraints file: read back as written, a marker only where Pythons differ, nothing stale."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
TOOL = runpy.run_path(str(ROOT / "tools/pin_versions.py"))
OLD, NEW = TOOL["OLD"], TOOL["NEW"]
PINS = st.dictionaries(
    st.sampled_from(["jax", "numpy", "markdown-it-py", "torch"]),
    st.sampled_from(["0.10.2", "2026.10.19.post1", "1!2.0", "5.0rc1"]),
)


@given(PINS, PINS)
def test_pins_are_read_back_as_they_were(old: dict[str, str], new: dict[str, str]):
    sides = {OLD: old, NEW: new}
    text = TOOL["pins_text"](sides)
    assert TOOL["read_pins"](text) == sides
    assert text.count(";") == sum(old.get(name) != new.get(name) for name in old) + sum(
        old.get(name) != new.get(name) for name in new
    )


def test_differences_name_both_versions():
    lines = TOOL["differences"]({"jax": "0.10.2", "peft": "0.21.0"}, {"jax": "0.12.0", "six": "1"})
    assert lines == [
        "jax: pinned 0.10.2, installed 0.12.0",
        "peft: pinned 0.21.0, installed nowhere",
        "six: pinned nowhere, installed 1",
    ]


def test_the_command_rewrites_its_own_side_alone(tmp_path: Path):
    file = tmp_path / "constraints.txt"
    own, other = (NEW, OLD) if sys.version_info >= (3, 12) else (OLD, NEW)
    file.write_text(f"gone==1.0 ; {own}\nelsewhere==2.0 ; {other}\n")
    assert TOOL["main"]([str(file)]) == 0
    sides = TOOL["read_pins"](file.read_text())
    assert sides[other] == {"elsewhere": "2.0"}
    assert "gone" not in sides[own] and "jax" in sides[own]
    assert "+" not in sides[own]["torch"] and "dsjax" not in sides[own]
    assert TOOL["main"]([str(file), "--check"]) == 0


@pytest.mark.parametrize("side", [OLD, NEW])
def test_what_the_package_needs_is_pinned_on_both_pythons(side: str):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    needed = [re.match(r"[\w.-]+", requirement)[0] for requirement in tested]
    pinned = TOOL["read_pins"]((ROOT / "constraints.txt").read_text())[side]
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in needed}
    assert {"jax", "torch", "ruff"} <= names
    assert names - pinned.keys() == set()
