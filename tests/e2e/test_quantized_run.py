# SPDX-License-Identifier: Apache-2.0
"""A LoRA run over quantized weights, from start to exports: what is written, proven and refused."""

import json
from dataclasses import replace
from pathlib import Path

import deepseek_variants
import numpy as np
import pytest
import small_run
import tiny
from safetensors.numpy import load_file

import dsjax
from dsjax import evaluate, train
from dsjax.adapters import lora_method
from dsjax.errors import ConfigError
from dsjax.export import command as export
from dsjax.export import verify

pytestmark = pytest.mark.slow

WITH_UPDATE = lora_method._with_update


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over NF4, experts included, on a mesh; its merged export passed the proof."""
    folder = tmp_path_factory.mktemp("quantized")
    config = small_run.write_inputs(
        folder,
        "lora",
        variant="deepseek_v3",
        model={"quantization": "nf4", "quantization_double": True},
        adapter={"target_modules": ["o_proj", "kv_b_proj", "down_proj"], "lora_dropout": 0.0},
        training={"max_steps": 6},
        optimizer={"warmup_ratio": 0.0, "learning_rate": 0.05},
        export={"format": "merged"},
        mesh={"expert": 2, "fsdp": 2, "data": 2},
    )
    tiny.build_checkpoint(folder / "model", "deepseek_v3", **deepseek_variants.BLOCKS_OF_64)
    assert train.main(["--config", str(config)]) == 0
    return folder / "run"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def words(run: Path, out: Path, form: str) -> list[str]:
    return ["--run", str(run), "--out", str(out), "--format", form]


def test_it_is_merged_into_the_checkpoint_s_own_weights(run: Path, tmp_path: Path) -> None:
    assert export.main(words(run, tmp_path / "adapter", "peft")) == 0
    source, merged = tensors(run.parent / "model"), tensors(run / "export")
    factors = tensors(tmp_path / "adapter")
    assert source.keys() == merged.keys()
    targeted = ("o_proj.weight", "kv_b_proj.weight", "down_proj.weight")
    changed = {name for name in source if (source[name] != merged[name]).any()}
    adapted = {name for name in source if name.endswith(targeted)}
    unused = adapted - changed  # experts that no token went to
    assert changed <= adapted and all(".experts." in name for name in unused)
    assert any(".experts." in name for name in changed)
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.o_proj"
        low, high = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in ("A", "B"))
        expected = source[f"{name}.weight"] + 32 / 4 * high @ low
        np.testing.assert_allclose(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    kept = json.loads((run / "export/dsjax_export.json").read_text("utf-8"))["kept"]
    assert kept == 1.0


@pytest.mark.parametrize("wrong", ["forgotten", "subtracted"])
def test_a_wrong_merge_is_refused_without_the_whole_model(
    run: Path, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = {
        "forgotten": lambda low, high, scaling: replace(
            WITH_UPDATE(low, high, scaling), apply=lambda source, _: source.astype(np.float32)
        ),
        "subtracted": lambda low, high, scaling: WITH_UPDATE(low, high, -scaling),
    }
    monkeypatch.setattr(lora_method, "_with_update", made[wrong])
    monkeypatch.delattr(verify, "sample_logits")
    monkeypatch.delattr(verify, "load_base")
    with pytest.raises(RuntimeError, match="logits differ from the trained model's by"):
        export.main(words(run, tmp_path / "out", "merged"))
    assert not (tmp_path / "out").exists()


def test_it_is_evaluated_as_it_was_trained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = json.loads((run / "eval_results.json").read_text())["eval_loss"]
    capsys.readouterr()
    assert evaluate.main(["--config", str(run.parent / "config.yaml")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        "model.quantization=int8",
        "model.quantization_skip_modules=[o_proj]",
    ],
)
def test_it_does_not_go_on_over_other_numbers(run: Path, other: str) -> None:
    overrides = [other] + ["model.quantization_double=false"] * ("int8" in other)
    with pytest.raises(ConfigError, match=other.partition("=")[0].replace(".", r"\.")):
        train.main(
            ["--config", str(run.parent / "config.yaml"), "training.max_steps=8", *overrides]
        )


def test_a_mesh_that_cuts_an_expert_s_matrix_is_refused(run: Path) -> None:
    mesh = ["mesh.tensor=2", "mesh.data=1"]
    with pytest.raises(ConfigError, match=r"mesh\.tensor: got 2, expected 1: a part of an expert"):
        train.main(["--config", str(run.parent / "config.yaml"), *mesh, "output_dir=elsewhere"])


@pytest.mark.parametrize("adapted", [False, True])
def test_a_loaded_model_is_saved_as_its_checkpoint_is(
    run: Path, adapted: bool, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    assert export.main(words(run, adapter, "peft")) == 0
    given = {"adapter": adapter} if adapted else {}
    for name, quantization in {"whole": None, "quantized": "nf4"}.items():
        model = dsjax.load_pretrained(
            run.parent / "model", dtype="float32", quantization=quantization, **given
        )
        model.save_pretrained(tmp_path / name)
    whole, found = tensors(tmp_path / "whole"), tensors(tmp_path / "quantized")
    assert whole.keys() == found.keys()
    assert [name for name in whole if (whole[name] != found[name]).any()] == []
