# SPDX-License-Identifier: Apache-2.0
"""Keys of model.quantization that cannot stand with one another, or with what trains."""

import pytest

from dsjax.config.load import make_config
from dsjax.errors import ConfigError

LORA = {"peft_type": "LORA"}


@pytest.mark.parametrize(
    ("model", "adapter", "message"),
    [
        (
            {"quantization": "nf4"},
            {},
            "model.quantization: got nf4 without an adapter, expected null; quantized weights do "
            "not train: set adapter.peft_type",
        ),
        (
            {"quantization": "int8", "quantization_double": True},
            LORA,
            "model.quantization_double: got true with int8, expected false; only nf4 has it",
        ),
        (
            {"quantization_experts": False},
            LORA,
            "model.quantization_experts: got false without model.quantization, expected nothing; "
            "set model.quantization, or leave it out",
        ),
        (
            {"quantization_skip_modules": ["o_proj"]},
            {},
            'model.quantization_skip_modules: got ["o_proj"] without model.quantization, expected '
            "nothing; set model.quantization, or leave it out",
        ),
    ],
)
def test_a_contradiction_names_both_sides(
    model: dict[str, object], adapter: dict[str, str], message: str
) -> None:
    tree = {"data": {"train": "t"}, "output_dir": "o", "adapter": adapter}
    with pytest.raises(ConfigError) as raised:
        make_config({**tree, "model": {"path": "m", **model}})
    assert str(raised.value) == message


@pytest.mark.parametrize("adapter", [LORA, {"path": "adapter"}])
def test_it_stands_with_an_adapter(adapter: dict[str, str]) -> None:
    model = {"path": "m", "quantization": "nf4", "quantization_double": True}
    tree = {"data": {"train": "t"}, "output_dir": "o", "adapter": adapter, "model": model}
    assert make_config(tree).model.quantization == "nf4"
