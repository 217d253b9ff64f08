# SPDX-License-Identifier: Apache-2.0
"""Many wrong names: few lines, in seconds, with what they have in common."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.adapters.prefix import PREFIX_TUNING, PrefixConfig
from dsjax.errors import ConfigError
from dsjax.models import base_shapes, build, carried_of, entries_of
from dsjax.models.tensor_names import MOST_EXAMPLES, examples, find_renamed, mismatches
from dsjax.models.weight_rules import coverage_problems, entry_shape
from dsjax.weights import peft

R1 = Path(__file__).parents[1] / "model_configs/deepseek_r1/config.json"
SAYS = {"rule": "from config.json", "config": "config.json", "place": "model.path"}


@pytest.fixture(scope="module")
def r1() -> SimpleNamespace:
    """The names of DeepSeek-R1: 45,395 tensors, and a scale beside most."""
    model = build(json.loads(R1.read_text()), "float32")
    shapes = base_shapes(model)
    entries = entries_of(model)
    wanted = {entry.hf: entry_shape(entry, shapes) for entry in entries}
    return SimpleNamespace(
        wanted=wanted, entries=entries, shapes=shapes, carried=carried_of(model), model=model
    )


RENAMES: dict[str, Callable[[str], str]] = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.module.": lambda name: f"_orig_mod.module.{name}",
    "model.language_model.": lambda name: name.replace("model.", "model.language_model.", 1),
    "lacks model.": lambda name: name.removeprefix("model."),
    "another prefix": lambda name: name.replace("model.", "transformer.", 1),
    "other words": lambda name: name.replace(".mlp.", ".ffn."),
    "numbers": lambda name: name.replace(".layers.", ".layers.1"),
    "nothing alike": lambda name: f"x{random.Random(name).getrandbits(64):x}",
}


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind == "lacks model." else pytest.param(kind, marks=pytest.mark.slow)
        for kind in RENAMES
    ],
)
def test_ninety_thousand_names_take_seconds_and_few_lines(r1: SimpleNamespace, kind: str) -> None:
    found = {RENAMES[kind](name): shape for name, shape in r1.wanted.items()}
    found |= {f"{name}_scale_inv": () for name in found}
    began = time.process_time()
    lines, _ = coverage_problems(r1.entries, r1.shapes, found, r1.carried)
    assert time.process_time() - began < 20
    assert 0 < len(lines) <= 3 * (MOST_EXAMPLES + 1)
    if kind.endswith(".") and not kind.startswith("lacks"):
        assert f"tensors whose names begin with {kind!r} (" in lines[0]
        assert lines[0].startswith("model.path: got 45,39")
    if kind == "lacks model.":
        assert lines[0].startswith("model.path: got 45,394 tensors whose names lack 'model.' (")


@pytest.mark.slow
def test_an_adapter_with_as_many_names(
    r1: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "base_model.model."
    wanted = {
        f"{module}{name.removesuffix('.weight')}.lora_{side}.weight": (2, 2)
        for name in r1.wanted
        for side in "AB"
    }
    infos = {f"{name}_": SimpleNamespace(shape=shape) for name, shape in wanted.items()}
    method = replace(PREFIX_TUNING, shapes=lambda *_: wanted)
    monkeypatch.setattr(peft, "method_of", lambda _: method)
    monkeypatch.setattr(peft, "_tensor_infos", lambda _: infos)
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        peft.check_tensors(str(tmp_path), r1.model, PrefixConfig(1), {}, len)
    assert time.process_time() - began < 20
    assert len(str(caught.value).splitlines()) == 2 * (MOST_EXAMPLES + 1)
    assert f"and {len(wanted) - MOST_EXAMPLES:,} more missing tensors" in str(caught.value)

    other = module + "model.layers.0.self_attn.q_proj.lora_A.weight"
    infos = {name.replace(module, "", 1): SimpleNamespace(shape=s) for name, s in wanted.items()}
    with pytest.raises(ConfigError) as caught:
        peft.check_tensors(str(tmp_path), r1.model, PrefixConfig(1), {}, len)
    said = str(caught.value)
    assert f"got {len(wanted):,} tensors whose names lack 'base_model.model.' (" in said
    assert said.startswith(f"adapter.path {tmp_path}/adapter_model.safetensors: ")
    assert len(said.splitlines()) == 1 and other.startswith(module)


NAMES = st.lists(
    st.from_regex(r"(a|b|model)\.(w|k)[0-9]{0,2}(\.weight)?", fullmatch=True),
    unique=True,
    max_size=30,
)


@given(wanted=NAMES, found=NAMES)
def test_every_mismatch_is_named_or_counted(wanted: list[str], found: list[str]) -> None:
    lines = mismatches(dict.fromkeys(wanted, ()), dict.fromkeys(found, ()), **SAYS)
    assert (lines == []) == (set(wanted) == set(found))
    missing, extra = set(wanted) - set(found), set(found) - set(wanted)
    counts = {"and": 0}
    said = {line.split(": got ")[0] for line in lines if ": got " in line}
    for line in lines:
        if line.startswith("and "):
            counts["and"] += int(line.split()[1].replace(",", ""))
    renamed = find_renamed([n for n in wanted if n in missing], extra)
    pairs = len(renamed.pairs) if renamed else 0
    assert len(said - {"model.path"}) + counts["and"] == len(missing) + len(extra) - 2 * pairs


@given(names=NAMES)
def test_examples_are_at_most_eight(names: list[str]) -> None:
    lines = examples(names, lambda name: name, "tensors")
    if len(names) <= MOST_EXAMPLES:
        assert lines == names
    else:
        assert len(set(lines[:-1])) == MOST_EXAMPLES and set(lines[:-1]) <= set(names)
        assert lines[-1] == f"and {len(names) - MOST_EXAMPLES} more tensors"


def test_a_few_missing_tensors_are_no_prefix() -> None:
    missing = ["model.layers.3.a.weight", "model.layers.3.b.weight"]
    assert find_renamed(missing, ["model.layers.4.a.weight", "model.layers.4.b.weight"]) is None
    assert find_renamed(missing, ["model.layers.3.x.a.weight"]) is None


def test_the_nearest_name_has_the_same_numbers() -> None:
    wanted = {f"model.layers.{layer}.q_proj.weight": () for layer in range(30)}
    found = {f"model.layers.{layer}.qproj.weight": () for layer in range(30)}
    line = mismatches(wanted, found, **SAYS)[0]
    assert line == (
        "model.layers.0.q_proj.weight: got no such tensor, expected shape [] from config.json; "
        "did you mean model.layers.0.qproj.weight?"
    )
