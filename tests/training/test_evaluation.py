# SPDX-License-Identifier: Apache-2.0
"""An evaluation holds no more rows at a time than a training step, and its sums do not change."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_run
import tiny_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax import train
from dsjax.adapters.lora import LoraConfig
from dsjax.distributed.compiled import memory_of
from dsjax.training import evaluation
from dsjax.training.evaluation import lower_eval_step, make_eval_step

ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"], lora_dropout=0.5)


def assert_portions_change_nothing(shape: dict, mesh: dict, portions: list[int], seed: int) -> None:
    """Compare the sums of a batch in portions with those of the whole."""
    run = tiny_steps.start(shape, ADAPTER, mesh)
    batch = tiny_steps.batch(rows=16, seed=seed)

    def sums(count: int) -> Any:
        step = make_eval_step(replace(run.config, accumulation=count))
        return jax.device_get(step(run.state.trainable, run.frozen, batch))

    whole = sums(1)
    for count in portions:
        found = sums(count)
        assert found.keys() == whole.keys()
        assert math.isclose(found.pop("loss"), whole["loss"], rel_tol=1e-5)
        for name, value in found.items():
            np.testing.assert_array_equal(value, whole[name], err_msg=name)


@pytest.mark.parametrize(
    ("shape", "mesh"),
    [
        ({}, {"fsdp": 2}),
        pytest.param(tiny_steps.V3, {"fsdp": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
)
def test_portions_change_no_sum(shape: dict, mesh: dict) -> None:
    assert_portions_change_nothing(shape, mesh, [2, 8], 0)


@pytest.mark.slow
@settings(max_examples=8)
@given(
    data=st.integers(0, 2),
    expert=st.integers(0, 1),
    portions=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_portions_change_no_sum_on_any_mesh(
    data: int, expert: int, portions: int, seed: int
) -> None:
    # Also more portions than the devices leave rows for.
    mesh = {"data": 2**data, "expert": 2**expert}
    assert_portions_change_nothing(tiny_steps.V3, mesh, [2**portions], seed)


def test_a_portion_s_memory_is_all_that_an_evaluation_needs() -> None:
    run = tiny_steps.start({"vocab_size": 512}, ADAPTER)

    def needed(rows: int, portions: int) -> int:
        config = replace(run.config, accumulation=portions)
        return memory_of(lower_eval_step(config, rows, 256).compile(), "cpu").peak

    one = needed(2, 1)
    assert needed(32, 16) < 1.5 * one < needed(32, 1)


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: in the evaluation")

    monkeypatch.setattr("dsjax.training.loop.evaluate_loss", fail)


@pytest.mark.slow
def test_a_failed_evaluation_does_not_stop_the_export(
    tmp_path: Path,
    broken: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brief = {"max_steps": 2, "eval_steps": None}
    words = ["--config", str(small_run.write_inputs(tmp_path, "lora", training=brief))]
    with pytest.raises(jax.errors.JaxRuntimeError, match="in the evaluation"):
        train.main(words)
    said, run = capsys.readouterr().err, tmp_path / "run"
    assert "compiled the evaluation in " in said
    failed = "the evaluation failed: JaxRuntimeError: RESOURCE_EXHAUSTED: in the evaluation;"
    assert said.index(failed) < said.index("exported merged to")
    assert (run / "export/config.json").is_file() and (run / "training_loss.png").is_file()
    assert not (run / "eval_results.json").exists()
    exported, card = _weights(run / "export"), (run / "export/README.md").read_text("utf-8")

    # The next run makes up for it, in the model card too; the weights are the same.
    monkeypatch.setattr("dsjax.training.loop.evaluate_loss", evaluation.evaluate_loss)
    assert train.main(words) == 0
    assert (run / "eval_results.json").is_file()
    assert (run / "export/README.md").read_text("utf-8") != card
    assert _weights(run / "export") == exported
