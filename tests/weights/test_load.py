# SPDX-License-Identifier: Apache-2.0
"""Loading gives the files' numbers on every mesh, in pieces or whole, or one message of faults."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from dsjax.config import MeshSection
from dsjax.distributed import arrays
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import Params, leaf_shardings
from dsjax.errors import ConfigError
from dsjax.models import build, entries_of
from dsjax.training.partition import make_partition
from dsjax.weights import fp8, hf_directory
from dsjax.weights import load as loading
from dsjax.weights.convert import to_flax

MESHES = {
    "one device": {"fsdp": 1},
    "data 8": {"data": 8, "fsdp": 1},
    "fsdp 8": {"fsdp": 8},
    "tensor 4, data 2": {"tensor": 4, "data": 2, "fsdp": 1},
    "fsdp 2, tensor 2, data 2": {"fsdp": 2, "tensor": 2, "data": 2},
}

Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with biases, in three files; its vocabulary is odd."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"num_hidden_layers": 2, "vocab_size": 281, "attention_bias": True}
    return tiny.build_checkpoint(folder, "llama_gqa", **shape)


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts and attention in block-wise FP8."""
    return tiny.build_checkpoint(tmp_path_factory.mktemp("fp8"), "deepseek_v3_fp8_ue8m0")


def _load(
    checkpoint: Path,
    mesh: Mapping[str, int],
    dtype: str = "float32",
    only: tuple[str, ...] = (),
) -> Params:
    source = loading.open_checkpoint(str(checkpoint))
    model = build(source.config, "float32")
    loading.check_coverage(source, model)
    section = MeshSection(**mesh)
    count = math.prod((section.data, section.fsdp, section.tensor, section.expert))
    devices = jax.devices()[:count]
    leaves = {
        path: replace(leaf, dtype=np.dtype(dtype))
        for path, leaf in make_partition(model).leaves.items()
        if not only or path.endswith(only)
    }
    shardings = leaf_shardings(leaves, make_mesh(section, devices))
    params = loading.load_base(source, model, leaves, shardings)
    for path, array in params.items():
        assert (array.sharding, array.dtype, array.shape) == (
            shardings[path],
            leaves[path].dtype,
            leaves[path].shape,
        )
    return params


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _check(params: Params, checkpoint: Path, dtype: str = "float32") -> None:
    """Every number is the files', rounded once."""
    found = _tensors(checkpoint)
    model = build(json.loads((checkpoint / "config.json").read_text()), "float32")
    for entry in entries_of(model):
        if entry.path in params:
            array = np.asarray(params[entry.path])[entry.index]
            expected = found[entry.hf].to(getattr(torch, dtype)).float().numpy()
            np.testing.assert_array_equal(array.astype(np.float32), expected, entry.hf)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_loads_the_files_numbers(mesh: str, checkpoint: Path) -> None:
    params = _load(checkpoint, MESHES[mesh])
    assert len(params) == 16
    _check(params, checkpoint)


@pytest.mark.parametrize("mesh", ["one device", "tensor 4, data 2", "fsdp 2, tensor 2, data 2"])
def test_pieces_give_the_whole(
    mesh: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Less than a row of down_proj, two rows of q_proj, all of a norm: pieces of every kind.
    monkeypatch.setattr(arrays, "PIECE_BYTES", 2 * 48 * 4)
    only = ("q_proj.weight", "down_proj.weight", "q_proj.bias", "model.norm.weight")
    if mesh == "one device":
        only = (*only, "input_layernorm.weight", "lm_head.weight")
    _check(_load(checkpoint, MESHES[mesh], only=only), checkpoint)


@pytest.mark.parametrize(
    ("mesh", "dtype"),
    [({"fsdp": 1}, "float16"), ({"fsdp": 2, "tensor": 2, "expert": 2}, "bfloat16")],
)
def test_devices_make_the_numbers_of_fp8(
    mesh: dict[str, int],
    dtype: str,
    fp8_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each device makes its own, of blocks that end within its part, all that the host would."""
    monkeypatch.setattr(arrays, "PIECE_BYTES", 1000)
    made, read = [], fp8.DequantisedSource.read_quantised

    def spy(*words: Any) -> fp8.Quantised | None:
        made.append(read(*words))
        return made[-1]

    monkeypatch.setattr(fp8.DequantisedSource, "read_quantised", spy)
    only = (
        "model.layers.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.mlp.experts.down_proj.weight",
    )
    params = _load(fp8_checkpoint, mesh, dtype, only)
    source = loading.open_checkpoint(str(fp8_checkpoint))
    assert len(params) == 2 and made and None not in made
    for entry in entries_of(build(source.config, "float32")):
        if entry.path in params:
            found = np.asarray(params[entry.path][entry.index])
            assert source.tensors[entry.hf].dtype == ml_dtypes.bfloat16  # as FP8 counts
            assert found.tobytes() == source.read(entry.hf).astype(dtype).tobytes(), entry.hf


def test_no_piece_is_larger_than_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", 4096)
    sizes = []
    read = hf_directory.HFSource.read

    def spy(source: hf_directory.HFSource, name: str, index: tuple[slice, ...] | None = None):
        values = read(source, name, index)
        sizes.append(values.nbytes)
        return values

    monkeypatch.setattr(hf_directory.HFSource, "read", spy)
    _load(checkpoint, {"fsdp": 1}, only=("embed_tokens.weight", "up_proj.weight"))
    assert 3000 < max(sizes) <= 4096
    assert sum(sizes) == 4 * (281 * 48 + 2 * 80 * 48)


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float32"),
        ("float16", "bfloat16"),
    ],
)
def test_dtypes_are_cast_once(stored: str, held: str, tmp_path: Path) -> None:
    tiny.build_checkpoint(tmp_path, "llama_mqa", dtype=stored, num_hidden_layers=1)
    _check(_load(tmp_path, {"fsdp": 1}, held, only=("q_proj.weight",)), tmp_path, held)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_values_that_float16_cannot_hold_are_refused(stored: str, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tiny.build_checkpoint(tmp_path, "llama_mqa", dtype=stored, num_hidden_layers=1)
    _change(tmp_path, lambda tensors: tensors[name][3].fill_(-70000.0))
    message = rf"{name}: got values beyond 65504, which float16 cannot hold, expected model.dtype"
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, {"fsdp": 1}, "float16", only=("up_proj.weight",))
    _load(tmp_path, {"fsdp": 1}, "bfloat16", only=("up_proj.weight",))


def _change(folder: Path, change: Change, **config: object) -> None:
    """Change the one weight file and config.json of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def _coverage(folder: Path) -> list[str]:
    source = loading.open_checkpoint(str(folder))
    return loading.check_coverage(source, build(source.config, "float32"))


def test_all_mismatches_come_in_one_message(tmp_path: Path) -> None:
    tiny.build_checkpoint(tmp_path, "llama_mha", num_hidden_layers=2)
    layer = "model.layers.1"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{layer}.self_attn.query.weight"] = tensors.pop(f"{layer}.self_attn.q_proj.weight")
        tensors[f"{layer}.mlp.up_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(48)
        tensors["model.layers.0.self_attn.v_proj.bias"] = torch.zeros(48)
        del tensors["lm_head.weight"]

    _change(tmp_path, change)
    with pytest.raises(ConfigError) as error:
        _coverage(tmp_path)

    lines = str(error.value).splitlines()
    shape = f"{layer}.mlp.up_proj.weight: got shape [3, 4], expected [80, 48] from config.json"
    assert len(set(lines)) == 7 and shape in lines
    assert any(line.startswith("config.json tie_word_embeddings: got false") for line in lines)
    missing = {line.split(":")[0]: line for line in lines if "got no such tensor" in line}
    assert set(missing) == {f"{layer}.self_attn.q_proj.weight", "lm_head.weight"}
    assert "expected shape [48, 48] from config.json" in missing[f"{layer}.self_attn.q_proj.weight"]
    undeclared = {line.split(":")[0] for line in lines if "does not declare" in line}
    assert undeclared == {
        f"{layer}.self_attn.query.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.v_proj.bias",
    }


def test_layers_beyond_the_configs_are_not_dropped(tmp_path: Path) -> None:
    tiny.build_checkpoint(tmp_path, "llama_mqa")
    _change(tmp_path, lambda tensors: None, num_hidden_layers=1)
    with pytest.raises(ConfigError) as error:
        _coverage(tmp_path)
    assert len(str(error.value).splitlines()) == 9  # the second layer's
    assert "model.layers.1.mlp.up_proj.weight: got a tensor that config.json" in str(error.value)


def test_only_tensors_that_the_family_lists_are_carried(tmp_path: Path) -> None:
    tiny.build_checkpoint(tmp_path, "llama_inv_freq", num_hidden_layers=2)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)}
    assert set(_coverage(tmp_path)) == frequencies

    others = {"vision.proj.weight": torch.zeros(2), "model.layers.0.gate": torch.zeros(1)}
    _change(tmp_path, lambda tensors: tensors.update(others))
    with pytest.raises(ConfigError) as error:
        _coverage(tmp_path)
    undeclared = "got a tensor that config.json does not declare, expected none"
    lines = str(error.value).splitlines()
    assert sorted(line.split(";")[0] for line in lines) == [
        f"{name}: {undeclared}" for name in sorted(others)
    ]


def test_a_head_beside_a_tied_embedding_has_to_be_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", 1000)
    tiny.build_checkpoint(tmp_path, "llama_tied", head_copy=True, num_hidden_layers=1)
    assert _coverage(tmp_path) == ["lm_head.weight"]

    _change(tmp_path, lambda tensors: tensors["lm_head.weight"][-1, -1].add_(1.0))
    message = "lm_head.weight: got a tensor that differs from model.embed_tokens.weight, expected"
    with pytest.raises(ConfigError, match=message):
        _coverage(tmp_path)
    _change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2, 48)}))
    with pytest.raises(ConfigError, match=message):
        _coverage(tmp_path)


def test_to_flax_holds_the_arrays_that_training_loads(checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    to_flax(str(checkpoint), str(tmp_path / "flax"), lambda *done: told.append(done))

    total = sum(tensor.nbytes for tensor in _tensors(checkpoint).values())
    assert told[-1] == (total, total) and told == sorted(told)
    assert not list((tmp_path / "flax").glob("model*.safetensors"))
    _check(_load(tmp_path / "flax", MESHES["fsdp 2, tensor 2, data 2"]), checkpoint)
    with pytest.raises(ConfigError, match="output directory: got .*flax', which is not empty"):
        to_flax(str(checkpoint), str(tmp_path / "flax"))


def test_to_flax_keeps_the_dtype_that_holds_every_layer(tmp_path: Path) -> None:
    source = tiny.build_checkpoint(tmp_path / "model", "llama_mqa", dtype="bfloat16")
    name = "model.layers.1.self_attn.q_proj.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].float() + 1e-6

    _change(source, widen)
    to_flax(str(source), str(tmp_path / "flax"))
    opened = loading.open_checkpoint(str(tmp_path / "flax"))
    found = _tensors(source)
    assert opened.tensors[name].dtype == np.float32
    assert opened.tensors[name.replace("1", "0")].dtype == ml_dtypes.bfloat16
    for tensor in (name, name.replace("1", "0")):
        np.testing.assert_array_equal(
            opened.read(tensor).astype(np.float32), found[tensor].float().numpy()
        )
