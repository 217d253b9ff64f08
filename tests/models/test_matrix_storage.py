# SPDX-License-Identifier: Apache-2.0
"""A kind of storage is a record: loaded in pieces, sharded, decoded in the scan, trained over.

Shown of int8. A model that holds its matrices so gives the numbers of a dense one whose weights are
the decoded ones.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_steps
from flax import nnx

from dsjax import adapters
from dsjax.adapters.ia3 import IA3Config
from dsjax.adapters.lora import LoraConfig
from dsjax.config import MeshSection
from dsjax.distributed import arrays
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import Leaf, leaf_shardings
from dsjax.models import Quantization, base_shapes, build, entries_of
from dsjax.models.layers import Linear
from dsjax.models.quantization.int8 import INT8, SCALE, decode, quantise
from dsjax.models.slots import LinearMap
from dsjax.models.storage import store
from dsjax.training.partition import make_partition
from dsjax.training.state import state_bytes
from dsjax.weights import load as loading

int8_build = functools.partial(build, quantization=Quantization("int8"))

MESHES = [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}]

SHAPES: dict[str, Any] = {"llama": {"attention_bias": True}, "v3": tiny_steps.V3}
LORA = {
    "llama": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
    "v3": tiny_steps.UNEVEN_EXPERTS,
}


def test_what_a_matrix_is_on_disk_does_not_change() -> None:
    dense, stored = (
        made(tiny_steps.SHAPE | SHAPES["v3"], "float32") for made in (build, int8_build)
    )
    assert base_shapes(stored) == base_shapes(dense)
    assert entries_of(stored) == entries_of(dense)
    leaves = make_partition(stored, dtype="bfloat16").leaves
    experts = "model.layers.mlp.experts.up_proj.weight"
    assert leaves[experts].dtype == np.int8 and leaves[experts].pinned
    assert leaves[experts + SCALE].shape == (2, 8, 16, 1)
    counts = [
        sum(leaf.count for leaf in make_partition(m).leaves.values()) for m in (stored, dense)
    ]
    assert counts[0] == counts[1]


def test_a_stored_matrix_does_not_train() -> None:
    partition = make_partition(int8_build(tiny_steps.SHAPE, "float32"))
    assert set(partition.trainable) == {
        "model.embed_tokens.weight",
        "model.layers.input_layernorm.weight",
        "model.layers.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize(
    ("variant", "mesh", "piece_bytes"),
    [
        pytest.param("llama_gqa", MESHES[0], 4000, id="llama"),
        pytest.param("deepseek_v3", MESHES[1], arrays.PIECE_BYTES, id="v3", marks=pytest.mark.slow),
    ],
)
def test_it_is_loaded_in_pieces_and_sharded_as_the_dense_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    mesh: dict[str, int],
    piece_bytes: int,
) -> None:
    source = loading.open_checkpoint(str(tiny.build_checkpoint(tmp_path, variant)))
    model = int8_build(source.config, "float32")
    leaves = make_partition(model).leaves
    shardings = leaf_shardings(leaves, _mesh_of(mesh))
    dense = leaf_shardings(make_partition(build(source.config, "float32")).leaves, _mesh_of(mesh))
    monkeypatch.setattr(arrays, "PIECE_BYTES", piece_bytes)

    params = loading.load_base(source, model, leaves, shardings)

    assert params.keys() == leaves.keys()
    assert {path: shardings[path] for path in dense} == dense
    scaled = {path for path in leaves if path + SCALE in leaves}
    assert {e.path for e in entries_of(model) if ".mlp." in e.path and "proj" in e.path} <= scaled
    for entry in entries_of(model):
        values = source.read(entry.hf)
        if entry.path in scaled:
            values, scale = quantise(values.astype(np.float32))
            np.testing.assert_array_equal(params[entry.path + SCALE][entry.index], scale)
        np.testing.assert_array_equal(params[entry.path][entry.index], values)


def _mesh_of(mesh: dict[str, int]) -> jax.sharding.Mesh:
    return make_mesh(MeshSection(**mesh))


def _int8(path: str, leaf: Leaf) -> np.ndarray:
    values = tiny_steps.random_array(path, leaf)
    if leaf.dtype == np.int8:
        return np.rint(np.clip(values / 0.15 * 40, -127, 127))
    return np.abs(values) / 40 + 0.002 if path.endswith(SCALE) else values


def _start(kind: str, monkeypatch: pytest.MonkeyPatch, **words: Any) -> tiny_steps.Run:
    with monkeypatch.context() as patch:
        patch.setattr(tiny_steps, "build", int8_build)
        return tiny_steps.start(SHAPES[kind], LORA[kind], values=_int8, **words)


def _start_dense(kind: str, stored: tiny_steps.Run) -> tiny_steps.Run:
    """A dense model of the decoded numbers."""

    def values(path: str, leaf: Leaf) -> np.ndarray:
        if path + SCALE not in stored.frozen:
            return tiny_steps.random_array(path, leaf)
        pair = {"": stored.frozen[path], SCALE: stored.frozen[path + SCALE]}
        return np.asarray(decode(pair, jnp.dtype(jnp.float32)))

    return tiny_steps.start(SHAPES[kind], LORA[kind], values=values)


@pytest.mark.parametrize("kind", ["llama", pytest.param("v3", marks=pytest.mark.slow)])
def test_training_over_it_is_training_over_the_decoded_numbers(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = _start(kind, monkeypatch)
    expected = tiny_steps.two_steps(_start_dense(kind, run))
    tiny_steps.assert_same(tiny_steps.two_steps(run), expected)
    mesh = MESHES[1] if kind == "v3" else MESHES[0]
    tiny_steps.assert_same(tiny_steps.two_steps(_start(kind, monkeypatch, mesh=mesh)), expected)


def test_no_stack_is_ever_decoded_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is decoded inside the scanned body: no float array of all layers' exists."""
    shape = {"num_hidden_layers": 5}
    monkeypatch.setitem(SHAPES, "llama", shape)
    training = {"gradient_checkpointing": "full"}
    run = _start("llama", monkeypatch, training=training)
    text = run.lower(tiny_steps.batch()).as_text()
    assert "tensor<5x64x32xi8>" in text and "tensor<64x32xf32>" in text
    assert "tensor<5x64x32xf32>" not in text
    dense = tiny_steps.start(shape, LORA["llama"], training=training)
    assert "tensor<5x64x32xf32>" in dense.lower(tiny_steps.batch()).as_text()
    sizes, other = (state_bytes(r.config, 8, 24) for r in (run, dense))
    held, before = sizes["frozen weights"] + sizes["quantized weights"], other["frozen weights"]
    assert "quantized weights" not in other
    # Seven matrices of 1,024 to 2,048 numbers a layer: 3 bytes less of each, 4 more a row.
    numbers, rows = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32, 32 + 16 + 16 + 32 + 64 + 64 + 32
    assert before - held == 5 * (3 * numbers - 4 * rows)


class _ByWeight(nnx.Module):
    """In a slot: the map once more, computed from its weight and bias."""

    def __call__(self, x: jax.Array, linear: LinearMap, dropout: None) -> jax.Array:
        assert linear.bias is not None
        return x @ linear.weight.T + linear.bias


def test_a_slot_is_handed_the_decoded_weight() -> None:
    linear = Linear(6, 4, (None, None), bias=True)
    store(linear, INT8)
    rng = np.random.default_rng(0)
    codes, scales = quantise(rng.normal(size=(4, 6)).astype(np.float32))
    arrays = {"weight": codes, f"weight{SCALE}": scales, "bias": np.float32([1, 2, 3, 4])}
    for name, values in arrays.items():
        setattr(linear, name, getattr(linear, name).replace(jnp.asarray(values)))
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    expected = linear(x)
    linear.adapter = nnx.data(_ByWeight())
    np.testing.assert_allclose(linear(x), expected, rtol=1e-6)


def test_first_values_are_made_of_the_decoded_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    ia3, path = adapters.ADAPTERS["IA3"], "model.layers.self_attn.q_proj"

    def initial(
        leaf_path: str, leaf: Leaf, model: Any, key: jax.Array, base: Mapping[str, jax.Array]
    ) -> jax.Array:
        if not base:
            return ia3.initial(leaf_path, leaf, model, key, base)
        assert list(base) == [f"{path}.weight"]
        return jnp.linalg.norm(base[f"{path}.weight"], axis=-1)

    def reads(leaf_path: str) -> list[str]:
        return [f"{path}.weight"] if leaf_path.endswith(".vector") else []

    method = replace(ia3, initial=initial, initial_reads=reads)
    monkeypatch.setattr(adapters, "ADAPTERS", {"IA3": method})
    model, spec = int8_build(tiny_steps.SHAPE, "float32"), IA3Config(["q_proj"], [])
    adapters.attach(model, spec)
    leaves = make_partition(model).leaves
    shardings = leaf_shardings(leaves, _mesh_of(MESHES[0]))
    loaded = {
        name: jax.device_put(_int8(name, leaves[name]).astype(leaves[name].dtype), shardings[name])
        for name in (f"{path}.weight", f"{path}.weight{SCALE}")
    }
    found = adapters.initial_params(model, spec, leaves, shardings, 0, loaded)
    vector = f"{path}.adapter.given.vector"
    codes, scales = map(np.asarray, loaded.values())
    np.testing.assert_allclose(found[vector], np.linalg.norm(codes * scales, axis=-1), rtol=1e-6)
    assert found[vector].sharding == shardings[vector] and found[vector].shape == (2, 32)
