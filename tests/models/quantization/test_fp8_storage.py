# SPDX-License-Identifier: Apache-2.0
"""FP8 as it comes: bytes and scales of the file, decoded to exactly the numbers that they are."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import WHOLE, check_experts, leaf_shardings
from dsjax.errors import ConfigError
from dsjax.models import Quantization, build, entries_of, stored_linears
from dsjax.models.quantization.fp8 import SCALE, numbers
from dsjax.training.partition import make_partition
from dsjax.weights import load as loading

FP8 = Quantization("fp8")
FLOAT32 = jnp.dtype("float32")


def load(path: Path, mesh: dict[str, int]) -> tuple[Any, Any, dict[str, jax.Array]]:
    source = loading.open_checkpoint(str(path))
    model = build(source.config, "float32", FP8)
    leaves = make_partition(model, dtype="float32").leaves
    devices = make_mesh(MeshSection(**mesh))
    check_experts(leaves, devices)
    return source, model, loading.load_base(source, model, leaves, leaf_shardings(leaves, devices))


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [
        ("deepseek_v3_fp8_mtp_hub", {"fsdp": 2, "expert": 4}),
        pytest.param("deepseek_v3_fp8_ue8m0", {"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param("deepseek_v32_fp8_mtp_hub", {"expert": 2, "fsdp": 4}, marks=pytest.mark.slow),
    ],
)
def test_every_matrix_is_decoded_to_the_file_s_numbers(
    tmp_path: Path, variant: str, mesh: dict[str, int]
) -> None:
    path = tiny.build_checkpoint(tmp_path, variant)
    source, model, params = load(path, mesh)
    stored = stored_linears(model)
    assert {"model.layers.mlp.experts.up_proj.weight", "model.layers.self_attn.o_proj.weight"} <= (
        stored.keys()
    )
    ragged = 0
    for weight, linear in stored.items():
        arrays = {name: params[weight + name] for name in linear.stored_as}
        values = linear.storage.decode(arrays, FLOAT32)
        ragged += any(n % size for n, size in zip(values.shape[-2:], _blocks(source), strict=True))
        for entry in [e for e in entries_of(model) if e.path == weight and not e.copy]:
            np.testing.assert_array_equal(values[entry.index], source.read(entry.hf))
    assert ragged


def _blocks(source: Any) -> list[int]:
    return source.config["quantization_config"]["weight_block_size"]


def test_bytes_are_the_numbers_of_float8() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(numbers(jnp.asarray(codes)), expected)


def test_a_checkpoint_that_is_not_in_fp8_is_refused(tmp_path: Path) -> None:
    source = loading.open_checkpoint(str(tiny.build_checkpoint(tmp_path, "llama_gqa")))
    with pytest.raises(ConfigError, match="got fp8 for a checkpoint that is not in FP8, expected"):
        build(source.config, "float32", FP8)


@pytest.mark.parametrize("wrong", ["wide", "tiny_scale"])
def test_a_tensor_that_cannot_be_held_so_is_named(tmp_path: Path, wrong: str) -> None:
    path = tiny.build_checkpoint(tmp_path, "deepseek_v3_fp8_mtp_hub")
    name, message = "model.layers.1.self_attn.o_proj.weight", "expected float8_e4m3fn with"
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors and wrong == "wide":
            tensors[name] = tensors[name].to(torch.bfloat16)
        if name + SCALE in tensors:
            if wrong == "wide":
                del tensors[name + SCALE]
            else:
                tensors[name + SCALE][0, 0], message = 1e-38, "float32 cannot hold all numbers"
        save_file(tensors, file, {"format": "pt"})
    index = path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    if wrong == "wide":
        del listed["weight_map"][name + SCALE]
    index.write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match=message):
        load(path, {"fsdp": 8})


def test_blocks_that_a_mesh_would_cut_are_not_decoded_by_parts(tmp_path: Path) -> None:
    path = tiny.build_checkpoint(tmp_path, "deepseek_v3_fp8_mtp_hub", moe_intermediate_size=24)
    model = build(loading.open_checkpoint(str(path)).config, "float32", FP8)
    leaves = make_partition(model).leaves
    scales = leaves[f"model.layers.mlp.experts.down_proj.weight{SCALE}"]
    assert scales.axes[-1] == WHOLE and scales.shape[-1] == 2
    with pytest.raises(ConfigError, match=r"mesh\.tensor: got 2, expected 1: a part of an expert"):
        check_experts(leaves, make_mesh(MeshSection(tensor=2, fsdp=4)))
