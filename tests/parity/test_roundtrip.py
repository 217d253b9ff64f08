# SPDX-License-Identifier: Apache-2.0
"""to-flax and then to-hf gives back every byte; training starts from either form alike."""

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
import torch_reference
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.parity

# Their configurations differ from others' here; their tensors are stored as those of others.
SLOW = (
    "deepseek_v2_biases",
    "deepseek_v2_defaults_hub",
    "deepseek_v2_groups",
    "deepseek_v3_defaults_hub",
    "deepseek_v3_hub",
    "deepseek_v3_odd",
    "deepseek_v3_plain",
    "deepseek_v32_dense",
    "deepseek_moe_norm",
)
AUXILIARY = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def convert() -> Any:
    """The `main` of tools/convert_weights.py, which is not part of the package."""
    path = runs.REPOSITORY / "tools" / "convert_weights.py"
    spec = importlib.util.spec_from_file_location("convert_weights", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def _header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def _check_tensors(source: Path, out: Path) -> None:
    expected, found = runs.read_tensors(source), runs.read_tensors(out)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert runs.as_bytes(found[name]) == runs.as_bytes(tensor), name


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=[pytest.mark.slow] if variant in SLOW else [])
        for variant in tiny.VARIANTS
    ],
)
def test_every_byte_comes_back(variant: str, convert: Any, tmp_path: Path) -> None:
    source = tiny.build_checkpoint(tmp_path / "source", variant)
    assert convert(["to-flax", str(source), str(tmp_path / "flax")]) == 0
    (hidden := tmp_path / "elsewhere").mkdir()
    source = source.rename(hidden / "source")
    assert convert(["to-hf", str(tmp_path / "flax"), str(tmp_path / "out")]) == 0

    out = tmp_path / "out"
    _check_tensors(source, out)
    for name in [*AUXILIARY, "LICENSE"]:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    if tiny.VARIANTS[variant].get("form") == "bin":
        return
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    for name in shards:
        assert set(_header(out / name)) == set(_header(source / name))
        assert _header(out / name)["__metadata__"]["format"] == "pt"
    index = source / "model.safetensors.index.json"
    assert (out / index.name).exists() == index.exists()
    if index.exists():
        theirs, ours = (json.loads((d / index.name).read_text()) for d in (source, out))
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


@pytest.mark.parametrize(
    "variant", ["qwen2", "llama_float16_hub", "qwen2_bfloat16", "deepseek_v3_fp8_mtp_hub"]
)
def test_any_bits_come_back(variant: str, convert: Any, tmp_path: Path) -> None:
    """NaNs with a payload, infinities, subnormal numbers, and arrays of nothing but -0."""
    source = tiny.build_checkpoint(tmp_path / "source", variant)
    generator = torch.Generator().manual_seed(9)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            raw = torch.randint(0, 256, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
            bits = raw.view(tensor.dtype).reshape(tensor.shape)
            tensors[name] = -torch.zeros_like(tensor) if name.endswith("norm.weight") else bits
        save_file(tensors, path, metadata={"format": "pt"})
    convert(["to-flax", str(source), str(tmp_path / "flax")])
    convert(["to-hf", str(tmp_path / "flax"), str(tmp_path / "out")])
    _check_tensors(source, tmp_path / "out")


def test_mixed_dtypes_come_back(convert: Any, tmp_path: Path) -> None:
    """Norms, or one layer only, may be wider than the rest; one may be in another half format."""
    source = tiny.build_checkpoint(tmp_path / "source", "llama_mha", dtype="bfloat16")
    path = source / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight") or name.startswith("model.layers.1.mlp"):
            tensors[name] = tensor.float() * 1.001
        if name == "model.layers.2.self_attn.q_proj.weight":
            tensors[name] = tensor.half()
    save_file(tensors, path, metadata={"format": "pt", "origin": "somewhere"})
    convert(["to-flax", str(source), str(tmp_path / "flax")])
    convert(["to-hf", str(tmp_path / "flax"), str(tmp_path / "out")])
    _check_tensors(source, tmp_path / "out")
    assert _header(tmp_path / "out" / path.name) == _header(path)


@pytest.mark.parametrize("variant", ["llama_bin", "llama_bin_bfloat16"])
def test_bin_shards_come_back_as_safetensors(variant: str, convert: Any, tmp_path: Path) -> None:
    source = tiny.build_checkpoint(tmp_path / "source", variant)
    convert(["to-flax", str(source), str(tmp_path / "flax")])
    convert(["to-hf", str(tmp_path / "flax"), str(tmp_path / "out")])

    names = sorted(path.name for path in source.glob("pytorch_model*.bin"))
    expected = [n.replace("pytorch_model", "model").replace(".bin", ".safetensors") for n in names]
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.safetensors")) == expected
    assert not list(out.glob("*.bin"))
    ids = tiny.random_ids(288)
    assert (tiny.reference_logits(out, ids) == tiny.reference_logits(source, ids)).all()


def test_the_dsjax_form_holds_arrays_and_not_the_source_files(convert: Any, tmp_path: Path) -> None:
    source = tiny.build_checkpoint(tmp_path / "source", "llama_inv_freq")
    convert(["to-flax", str(source), str(tmp_path / "flax")])

    folder = tmp_path / "flax"
    assert not [*folder.rglob("model*.safetensors"), *folder.rglob("*.bin")]
    weight = runs.as_bytes(runs.read_tensors(source)["model.layers.1.mlp.up_proj.weight"])
    for path in folder.rglob("*.safetensors"):
        assert weight not in path.read_bytes(), path


@pytest.mark.slow
def test_training_from_either_form_is_the_same(
    convert: Any, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    source = tiny.build_checkpoint(tmp_path / "source", "qwen2_bfloat16")
    convert(["to-flax", str(source), str(tmp_path / "flax")])
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=8)
    losses, exports = [], []
    for form in ("source", "flax"):
        directory = tmp_path / f"from_{form}"
        directory.mkdir()
        config = {
            "model": {"path": str(tmp_path / form), "dtype": "bfloat16"},
            "adapter": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"},
            "data": {"train": [str(data)], "format": "tokens", "packing": False},
            "training": {"max_steps": 3, "batch_size": 4},
            "logging": {"logging_steps": 1, "report_to": []},
            "export": {"format": "merged", "min_kept": None},
        }
        losses.append([step["loss"] for step in runs.train(run_cli, config, directory)])
        exports.append(runs.read_tensors(directory / "run" / "export"))
    assert losses[0] == losses[1]
    assert set(exports[0]) == set(exports[1])
    for name, tensor in exports[0].items():
        assert torch.equal(tensor, exports[1][name]), name
