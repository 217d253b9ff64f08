# SPDX-License-Identifier: Apache-2.0
"""A full run that moves routers' biases and trains the prediction module: what it logs and exports.

Here: an FP8 checkpoint, a stop and a resume. Not here: the numbers of loss and gradients
(tests/parity), a step's rules (tests/models, tests/objectives).
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import tiny
import torch
from test_fp8_export import same, tensors

import dsjax
from dsjax import evaluate, train

pytestmark = pytest.mark.slow

VARIANT, SPEED = "deepseek_v3_fp8_mtp_hub", 0.125
BIAS = "mlp.gate.e_score_correction_bias"
MODULE = "model.layers.3."
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps at one learning rate."""
    return small_run.write_inputs(
        tmp_path_factory.mktemp("ahead"),
        "full",
        variant=VARIANT,
        training={"max_steps": 3, "eval_steps": None, "freeze": []},
        optimizer={"lr_scheduler_type": "constant", "warmup_steps": 0},
        objective={"mtp_loss_weight": 0.3, "bias_update_speed": SPEED},
        data={"eval": None},
        logging={"logging_steps": 1, "report_to": []},
        mesh={"expert": 2, "data": 2, "tensor": 2, "fsdp": 1},
    )


@pytest.fixture(scope="module")
def export(config: Path) -> Path:
    """What the run exports."""
    assert train.main(["--config", str(config)]) == 0
    return config.parent / "run/export"


def test_everything_that_trains_is_written(config: Path, export: Path) -> None:
    source, out = tensors(config.parent / "model"), tensors(export)
    weights = {name for name in source if not name.endswith("_scale_inv")}
    assert set(out) == weights  # all that was FP8 has changed, and is bfloat16
    assert {name for name in weights if same(out[name], source[name])} == set()
    biases = [name for name in weights if name.endswith(BIAS)]
    assert {int(name.split(".")[2]) for name in biases} == {1, 2, 3}
    for name in biases:
        assert out[name].dtype == source[name].dtype == torch.float32
        steps = ((out[name] - source[name]) / SPEED).numpy()
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
        assert 1 <= np.abs(steps).max() <= 3.001
    assert same(out[MODULE + "embed_tokens.weight"], out[EMBEDDING])
    assert same(out[MODULE + "shared_head.head.weight"], out["lm_head.weight"])
    assert tuple(out[MODULE + "eh_proj.weight"].shape) == (48, 96)


def test_the_export_loads_and_is_the_trained_model(export: Path) -> None:
    ids = tiny.random_ids(288, batch=1, length=12)
    model = dsjax.load_pretrained(str(export), dtype="float32")
    ours = np.asarray(model(jnp.asarray(ids)))
    np.testing.assert_allclose(ours, tiny.reference_logits(export, ids), rtol=0, atol=1e-3)


def test_its_loss_is_logged_beside_the_loss(config: Path, export: Path) -> None:
    rows = [row for row in small_run.metrics(config.parent / "run") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["mtp_loss"] != row["loss"]
        assert row["dropped_tokens"] == 0
    assert rows[-1]["mtp_loss"] < rows[0]["mtp_loss"]


def test_evaluation_leaves_the_module_out(
    config: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(evaluate, "measure", lambda config, parts, *rest: seen.append(parts) or {})
    rows = config.parent / "eval.jsonl"
    assert evaluate.main(["--config", str(config), f"data.eval={rows}"]) == 0
    assert seen[0].model.mtp is None
    assert any(path.endswith(BIAS) for path in seen[0].partition.trainable)


def test_a_resumed_run_is_the_unbroken_one(config: Path, export: Path, tmp_path: Path) -> None:
    words = ["--config", str(config), f"output_dir={tmp_path / 'run'}", "logging.logging_steps=3"]
    assert train.main([*words, "training.max_steps=1", "export.format=null"]) == 0
    assert train.main(words) == 0
    out, whole = tensors(tmp_path / "run/export"), tensors(export)
    assert {name for name in whole if not same(out[name], whole[name])} == set()


def test_without_the_options_neither_is_touched(config: Path, tmp_path: Path) -> None:
    words = ["objective.mtp_loss_weight=0", "objective.bias_update_speed=0"]
    run = [*words, "training.max_steps=1", f"output_dir={tmp_path / 'run'}"]
    assert train.main(["--config", str(config), *run]) == 0
    source, out = tensors(config.parent / "model"), tensors(tmp_path / "run/export")
    kept = [name for name in source if name.startswith(MODULE) or name.endswith(BIAS)]
    assert len(kept) > 50 and all(same(out[name], source[name]) for name in kept)
    assert all("mtp_loss" not in row for row in small_run.metrics(tmp_path / "run"))
