# SPDX-License-Identifier: Apache-2.0
"""A merged export whose weights are well written, and wrong, is refused; what is right passes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_run
import tiny
from safetensors.numpy import load_file

from dsjax import export, logit_proof, merge, train

TARGETS = {"llama_gqa": ["q_proj", "v_proj"], "deepseek_v3_fp8_mtp_hub": ["o_proj", "kv_b_proj"]}
MESHES = {"llama_gqa": {}, "deepseek_v3_fp8_mtp_hub": {"expert": 2, "fsdp": 2, "data": 2}}
WRONG = {
    "forgotten": lambda low, high, scaling: replace(
        WITH_UPDATE(low, high, scaling), apply=lambda source, factors: source.astype(np.float32)
    ),
    "subtracted": lambda low, high, scaling: WITH_UPDATE(low, high, -scaling),
}
WITH_UPDATE = merge._with_update


@pytest.fixture(scope="module", params=TARGETS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LoRA on a checkpoint in 16 bits or fewer; its export passed the proof."""
    folder = tmp_path_factory.mktemp("proof")
    config = small_run.write_inputs(
        folder,
        "lora",
        variant=request.param,
        adapter={"target_modules": TARGETS[request.param], "lora_dropout": 0.0},
        training={"max_steps": 6, "eval_steps": None},
        data={"eval": None},
        optimizer={"warmup_ratio": 0.0, "learning_rate": 0.05},
        export={"format": "merged"},
        mesh=MESHES[request.param],
    )
    if request.param == "llama_gqa":
        tiny.build_checkpoint(folder / "model", request.param, dtype="bfloat16")
    assert train.main(["--config", str(config)]) == 0
    return config


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_merge_is_refused(
    config: Path, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(merge, "_with_update", WRONG[wrong])
    words = ["--run", str(config.parent / "run"), "--out", str(tmp_path / "out")]
    with pytest.raises(RuntimeError, match="logits differ from the trained model's by"):
        export.main([*words, "--format", "merged"])
    assert not (tmp_path / "out").exists()


def test_a_float64_checkpoint_passes(tmp_path: Path) -> None:
    config = small_run.write_inputs(
        tmp_path, "lora", training={"max_steps": 1, "eval_steps": None}, data={"eval": None}
    )
    tiny.build_checkpoint(tmp_path / "model", "llama_gqa", dtype="float64")
    words = ["--config", str(config), "model.dtype=float32", "export.format=merged"]
    assert train.main(words) == 0
    files = [*(tmp_path / "run/export").glob("*.safetensors")]
    arrays = [array for file in files for array in load_file(file).values()]
    assert {array.dtype.name for array in arrays} == {"float64"}


def test_the_distance_is_that_of_the_middle_token() -> None:
    expected = np.ones((5, 4), np.float32)
    logits = expected * np.array([[1.0], [1.1], [1.2], [9.0], [1.0]], np.float32)
    assert logit_proof.distance(logits, expected) == pytest.approx(0.1, rel=1e-5)
