# SPDX-License-Identifier: Apache-2.0
"""An adapter's folder, whatever was done to it: loaded as it is, or refused by its name."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from spoilt import spoilt

from dsjax import adapters
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.prefix import PrefixConfig
from dsjax.config import AdapterSection
from dsjax.errors import ConfigError
from dsjax.training.partition import make_partition
from dsjax.weights import peft
from dsjax.weights.adapter import check_params, check_targets, fitted, resolve

LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "layers_to_transform": [0],
    "rank_pattern": {"v_proj": 3},
    "alpha_pattern": {"q_proj": 6},
    "use_rslora": False,
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
}
EXPERTS = LORA | {
    "target_modules": ["q_a_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
PREFIX = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, LORA),
    "experts": (tiny_steps.V3, EXPERTS),
    "prefix": ({}, PREFIX),
}
"""Changes to a tiny model's shape, and an adapter_config.json for it."""


def _load(folder: Path, shape: dict[str, Any]) -> dict[str, np.ndarray]:
    """What every command does with an adapter's folder, up to its arrays."""
    section, model = AdapterSection(path=str(folder)), tiny_steps.model_of(**shape)
    spec, _ = fitted(section, resolve(section), model)
    assert spec is not None
    check_targets(section, spec, model)
    adapters.attach(model, spec)
    leaves = make_partition(model).leaves
    check_params(str(folder), model, spec, leaves, lambda name: np.zeros((64, 32), "f4"))
    return peft.read_params(str(folder), model, spec, leaves)


def _header_and_values(shape: dict[str, Any], config: dict[str, Any]) -> tuple[Any, bytes]:
    """The header of the file of tensors that goes with a config, and what follows it."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "adapter_config.json").write_text(json.dumps(config))
        spec = resolve(AdapterSection(path=name))
    assert isinstance(spec, LoraConfig | PrefixConfig)
    model = tiny_steps.model_of(**shape)
    adapters.attach(model, spec)
    header, end = {}, 0
    shapes = adapters.method_of(spec).shapes(model, spec, make_partition(model).leaves)
    for tensor, size in shapes.items():
        begin, end = end, end + 4 * int(np.prod(size))
        header[tensor] = {"dtype": "F32", "shape": list(size), "data_offsets": [begin, end]}
    return header | {"__metadata__": {"format": "pt"}}, bytes(end)


FILES = {kind: _header_and_values(*parts) for kind, parts in KINDS.items()}


def _write(folder: Path, config: bytes, header: bytes, values: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(config)
    content = len(header).to_bytes(8, "little") + header + values
    (folder / "adapter_model.safetensors").write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_folder_is_loaded(kind: str, tmp_path: Path):
    (shape, config), (header, values) = KINDS[kind], FILES[kind]
    _write(tmp_path, json.dumps(config).encode(), json.dumps(header).encode(), values)
    assert sum(array.size for array in _load(tmp_path, shape).values()) > 0


@st.composite
def _folders(draw: st.DrawFn) -> tuple[str, bytes, bytes, bytes]:
    """A kind of adapter, its config, its header and its values: one of the three is damaged."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    config, (header, values) = KINDS[kind][1], FILES[kind]
    texts = [json.dumps(config).encode(), json.dumps(header).encode(), values]
    which = draw(st.sampled_from([0, 0, 0, 1, 1, 2]))
    if which < 2:
        texts[which] = draw(spoilt((config, header)[which]))
    else:
        texts[2] = values[: draw(st.integers(0, len(values)))] + draw(st.binary(max_size=9))
    return kind, texts[0], texts[1], texts[2]


def _is_loaded_or_refused(kind: str, config: bytes, header: bytes, values: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        _write(Path(name), config, header, values)
        try:
            arrays = _load(Path(name), KINDS[kind][0])
        except ConfigError as error:
            assert "adapter" in str(error) and len(str(error)) < 10_000
            return
        assert all(array.dtype == np.float32 for array in arrays.values())


@settings(max_examples=12)
@given(_folders())
def test_a_damaged_folder_is_loaded_or_refused(folder):
    _is_loaded_or_refused(*folder)


@pytest.mark.slow
@settings(max_examples=300)
@given(_folders())
def test_many_damaged_folders_are_loaded_or_refused(folder):
    _is_loaded_or_refused(*folder)


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        (LORA, "ec837ab83cf3a2f2dbeb38498aeb419c"),
        (PREFIX, "1a28140b47c7afc0c9befb83e2809eb9"),
    ],
)
def test_checkpoints_know_an_adapter_again(tmp_path: Path, fields: dict[str, Any], known: str):
    """A run that began from it goes on, whatever its description is called here."""
    (tmp_path / peft.CONFIG).write_text(json.dumps(fields))
    (tmp_path / peft.TENSORS).write_bytes(b"of any content")
    assert peft.contents(str(tmp_path), peft.read_spec(str(tmp_path))) == known
