# SPDX-License-Identifier: Apache-2.0
"""The method that docs/adding_an_adapter.md builds trains, is written, read and merged."""

import re
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import tiny_steps

from dsjax import adapters
from dsjax.models.slots import LinearSlot

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/adding_an_adapter.md"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the page's code defines, its method registered."""
    defined: dict = {"__name__": "scale"}
    for block in re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.M | re.S):
        exec(block, defined)
    registry = MappingProxyType({**adapters.ADAPTERS, "SCALE": defined["SCALE"]})
    monkeypatch.setattr(adapters, "ADAPTERS", registry)
    return SimpleNamespace(**defined)


@pytest.mark.slow
def test_it_trains_alike_on_a_mesh(page: SimpleNamespace) -> None:
    config = page.ScaleConfig(["o_proj", "kv_b_proj"])
    one = tiny_steps.two_steps(tiny_steps.start(tiny_steps.V3, config))
    assert set(one.trained) == {
        f"model.{stack}.self_attn.{name}.adapter.scale"
        for stack in ("dense_layers", "layers")
        for name in ("o_proj", "kv_b_proj")
    }
    many = tiny_steps.start(tiny_steps.V3, config, mesh={"fsdp": 2, "tensor": 2, "expert": 2})
    tiny_steps.assert_same(tiny_steps.two_steps(many), one)


def test_it_is_written_read_and_merged(page: SimpleNamespace) -> None:
    config = page.ScaleConfig(["o_proj"])
    run = tiny_steps.start(adapter=config)
    model, params = tiny_steps.full_model(run), run.trainable()
    method = adapters.method_of(config)
    found = method.to_file(model, config, params)
    assert {name: array.shape for name, array in found.items()} == method.shapes(model, config, {})
    read = method.from_file(model, config, run.config.partition.leaves, found)
    path = "model.layers.self_attn.o_proj.adapter.scale"
    np.testing.assert_array_equal(read[path], params[path])

    change = method.merged(model, config, params)["model.layers.1.self_attn.o_proj.weight"]
    weight = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(change((slice(0, 3),), weight), weight * params[path][1])
    assert isinstance(page.Scale(model.model.layers.self_attn.o_proj), LinearSlot)


def test_its_config_says_what_peft_would_read(page: SimpleNamespace) -> None:
    model = tiny_steps.model_of()
    fields = adapters.peft_config(model, page.ScaleConfig(["o_proj"]), "base")
    assert fields["peft_type"] == "SCALE" and fields["target_modules"] == ["o_proj"]
