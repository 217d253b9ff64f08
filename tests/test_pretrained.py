# SPDX-License-Identifier: Apache-2.0
"""The library's calls on a model: any mesh, ids, generation, a save of the values it has now."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from jax.sharding import Mesh

import dsjax
from dsjax.data import encode_chat, encode_text
from dsjax.decoding import decode
from dsjax.errors import ConfigError
from dsjax.models import Model

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


@pytest.mark.parametrize("words", [{"path": ""}, {"path": "x", "adapter": ""}])
def test_an_empty_path_is_refused(words: dict[str, str]):
    with pytest.raises(ConfigError, match=": got an empty text, expected a folder or a hub id"):
        dsjax.load_pretrained(**words)


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


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return dsjax.load_pretrained(checkpoint, dtype="float32")


def test_ids_in_any_form_give_the_same_logits(model: Model):
    expected = np.asarray(model(IDS))
    for form in (np.asarray(IDS), np.asarray(IDS).tolist(), torch.tensor(np.asarray(IDS))):
        np.testing.assert_array_equal(np.asarray(model(form)), expected)
    with pytest.raises(ConfigError, match="input_ids: got token 99999, expected ids from 0 to"):
        model([[99999]])


def test_generate_gives_what_was_asked_in_its_form(
    model: Model, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    ids = encode_text(model.tokenizer, "the question")
    (row,) = decode.generate(model, [ids], max_new_tokens=10, stop_ids=[1])
    text = model.tokenizer.decode(row, skip_special_tokens=True)
    assert model.generate("the question", max_new_tokens=10) == text
    assert capsys.readouterr().err == "prompt 1: cut at 10 new tokens\n"
    assert model.generate(["the question"] * 2, max_new_tokens=10) == [text, text]
    assert model.generate(ids, max_new_tokens=10) == row
    assert model.generate(np.array([ids, ids]), max_new_tokens=10) == [row, row]
    assert model.generate([], max_new_tokens=10) == []
    chat = [{"role": "user", "content": "the question"}]
    (answer,) = model.generate([encode_chat(model.tokenizer, chat)], max_new_tokens=10)
    text = model.tokenizer.decode(answer, skip_special_tokens=True)
    assert model.generate(chat, max_new_tokens=10) == text


def test_a_stop_text_ends_an_answer(model: Model, capsys: pytest.CaptureFixture[str]):
    text = model.generate("the question", max_new_tokens=10)
    stop, before = text[4:6], text[: text.index(text[4:6])]
    capsys.readouterr()
    assert model.generate("the question", max_new_tokens=10, stop=[stop]) == before
    assert capsys.readouterr().err == ""


def test_draws_are_those_of_the_seed(model: Model):
    drawn = [
        model.generate([5, 6, 7], max_new_tokens=10, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (7, {}, "prompts: got a int, expected a text, a conversation"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ([5], {"top_p": 2.0, "temperature": 1.0}, "top_p: got 2.0"),
        ([5], {"stop": ["a"]}, "stop: got .'a'., expected .* and prompts that are texts"),
        ("a", {"stop": "a"}, "stop: got 'a', expected a list of texts"),
        ("a", {"stop": [""]}, "stop: got .*none of them empty"),
        ([99999], {}, "prompt 1: got token 99999"),
    ],
)
def test_requests_are_checked(model: Model, prompts, options, message: str):
    with pytest.raises(ConfigError, match=message):
        model.generate(prompts, **options)


def test_a_checkpoint_without_tokenizer_continues_ids(checkpoint: Path, tmp_path: Path):
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    model = dsjax.load_pretrained(bare, dtype="float32")
    assert len(model.generate([5, 6, 7], max_new_tokens=3)) == 3
    with pytest.raises(ConfigError, match=r"without tokenizer.json, expected the checkpoint's"):
        model.generate("text")


def test_a_model_saves_itself(model: Model, checkpoint: Path, tmp_path: Path):
    model.save_pretrained(tmp_path / "out")
    for file in checkpoint.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
