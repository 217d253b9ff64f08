# SPDX-License-Identifier: Apache-2.0
"""The library's two calls: any mesh of the caller's, and a save of the values the model has now."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

import dsjax
from dsjax.errors import ConfigError

IDS = jnp.asarray(tiny.random_ids(190), jnp.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    tiny.build_checkpoint(folder, "llama_gqa")
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> Path:
    """A LoRA adapter as PEFT saves it, that changes the logits."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny.reference_model(checkpoint), LoraConfig(r=2, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(checkpoint.parent / "adapter")
    return checkpoint.parent / "adapter"


def logits(path: Path, **words) -> np.ndarray:
    return np.asarray(dsjax.load_pretrained(str(path), dtype="float32", **words)(IDS))


@pytest.mark.parametrize("kind", ["explicit", "subset", "one_axis", "reordered"])
def test_a_mesh_of_the_callers(checkpoint: Path, kind: str):
    devices = np.array(jax.devices()[:4])
    meshes = {
        "explicit": lambda: jax.make_mesh((2, 2), ("data", "fsdp"), devices=devices),
        "subset": lambda: Mesh(devices.reshape(2, 2), ("fsdp", "tensor")),
        "one_axis": lambda: Mesh(devices, ("fsdp",)),
        "reordered": lambda: Mesh(devices.reshape(2, 2), ("tensor", "data")),
    }
    sharded = logits(checkpoint, mesh=meshes[kind]())
    np.testing.assert_allclose(sharded, logits(checkpoint), atol=5e-5)


def test_a_mesh_of_other_axes_is_refused(checkpoint: Path):
    with pytest.raises(ConfigError, match=r"mesh: got axes \['x'\], expected axes among data"):
        logits(checkpoint, mesh=Mesh(np.array(jax.devices()[:2]), ("x",)))


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_merged_save_holds_what_the_model_has_now(
    checkpoint: Path, adapter: Path, tmp_path: Path, with_adapter: bool
):
    words = {"adapter": str(adapter)} if with_adapter else {}
    model = dsjax.load_pretrained(str(checkpoint), dtype="float32", **words)
    model.model.norm.weight[...] = model.model.norm.weight[...] * 2
    dsjax.save_pretrained(model, str(tmp_path / "out"))
    np.testing.assert_allclose(logits(tmp_path / "out"), np.asarray(model(IDS)), atol=2e-4)


def test_what_did_not_change_keeps_its_bytes(checkpoint: Path, tmp_path: Path):
    """Loaded in bfloat16, which holds less than the file."""
    dsjax.save_pretrained(dsjax.load_pretrained(str(checkpoint)), str(tmp_path / "out"))
    for file in checkpoint.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_save_is_no_run_s_export(checkpoint: Path, tmp_path: Path):
    """Else a run could take it for its own, and replace it."""
    marked = tmp_path / "marked"
    dsjax.save_pretrained(dsjax.load_pretrained(str(checkpoint)), str(marked))
    (marked / "dsjax_export.json").write_text(json.dumps({"run": "x"}))
    dsjax.save_pretrained(dsjax.load_pretrained(str(marked)), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "dsjax_export.json").exists()


def test_directory_and_format_are_checked(checkpoint: Path, tmp_path: Path):
    model = dsjax.load_pretrained(str(checkpoint))
    with pytest.raises(ConfigError, match="without an adapter, expected merged"):
        dsjax.save_pretrained(model, str(tmp_path / "out"), format="peft")
    with pytest.raises(ConfigError, match="format: got 'gguf', expected merged or peft"):
        dsjax.save_pretrained(model, str(tmp_path / "out"), format="gguf")
    with pytest.raises(ConfigError, match="which is not empty"):
        dsjax.save_pretrained(model, str(checkpoint))
