# SPDX-License-Identifier: Apache-2.0
"""An objective that only the registry knows: its names arrive everywhere, its terms are exact."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import tiny_steps

from dsjax import evaluate, train
from dsjax.adapters.lora import LoraConfig
from dsjax.config import ObjectiveSection
from dsjax.data import Batch
from dsjax.errors import ConfigError
from dsjax.models import Model
from dsjax.objectives import OBJECTIVES, SFT, unused_keys
from dsjax.objectives.objective import Forward, Gauge, Metric, Objective, Sums, Term
from dsjax.training.evaluation import make_eval_step
from dsjax.training.meter import Meter

Z_WEIGHT = 0.1
ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def _toy_sums(model: Model, batch: Batch, forward: Forward, options: ObjectiveSection) -> Sums:
    """Cross-entropy over trained tokens, and the square of the log-partition over real ones."""
    model.all_gather_embeddings(forward.layout)
    ids, positions, segments = batch.input_ids, batch.position_ids, batch.segment_ids
    given = {"remat": forward.remat, "dropout": forward.dropout, "layout": forward.layout}
    hidden = model.hidden(*map(jnp.asarray, (ids, positions, segments)), **given)
    logits_BTV = model.head(hidden.states, forward.dropout)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, jnp.asarray(batch.targets)[..., None], axis=-1)
    real_BT = batch.segment_ids > 0
    return {
        "loss": jnp.sum((log_z_BT - picked_BT[..., 0]) * batch.loss_weights),
        "trained": jnp.sum(batch.loss_weights),
        "z": jnp.sum(log_z_BT**2 * real_BT),
        "tokens": jnp.sum(real_BT, dtype=jnp.int32),
        "rows": jnp.sum(jnp.any(real_BT, axis=1), dtype=jnp.int32),
    }


TOY = Objective(
    keys=(),
    batch_fields=Batch._fields,
    sums=_toy_sums,
    terms=lambda options: {
        "loss": Term(lambda batch: jnp.sum(batch.loss_weights)),
        "z": Term(lambda batch: jnp.sum(batch.segment_ids > 0), Z_WEIGHT),
    },
    metrics={
        "loss": Metric("loss", "trained", "loss {:.4f}"),
        "z_loss": Metric("z", "tokens", "z {:.2f}"),
    },
    eval_metrics={
        "loss": Metric("loss", "trained", "eval loss {:.4f}"),
        "z_loss": Metric("z", "tokens", "eval z {:.2f}"),
        "z_root": Metric("z", "tokens", value=math.sqrt),
    },
    gauges={"filled_rows": Gauge("rows", lambda sums, model: int(sums["rows"]), "filled {}")},
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "sft", TOY)


def _start(mesh: Mapping[str, int] | None, portions: int) -> tiny_steps.Run:
    training = {"batch_size": 16, "gradient_accumulation_steps": portions}
    return tiny_steps.start(adapter=ADAPTER, mesh=mesh, training=training)


def _expected(run: tiny_steps.Run, batch: Batch) -> dict[str, jax.Array]:
    """The gradient of the quotients themselves, of the batch as a whole."""

    def loss(trainable: dict[str, jax.Array]) -> jax.Array:
        model = run.config.partition.merge(trainable, run.frozen)
        sums = _toy_sums(model, batch, Forward(), ObjectiveSection())
        return sums["loss"] / sums["trained"] + Z_WEIGHT * sums["z"] / sums["tokens"]

    return jax.grad(loss)(run.state.trainable)


@pytest.mark.parametrize(
    ("mesh", "portions"),
    [
        (None, 1),
        pytest.param(None, 4, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 4}, 1, marks=pytest.mark.slow),
        pytest.param({"data": 8}, 2, marks=pytest.mark.slow),
    ],
)
def test_each_term_is_divided_once_over_portions_and_devices(
    mesh: Mapping[str, int] | None, portions: int
) -> None:
    run, batch = _start(mesh, portions), tiny_steps.batch(rows=16)
    expected = _expected(_start(None, 1), batch)
    report = run.step(batch)
    assert report.sums.keys() == {"loss", "trained", "z", "tokens", "rows"}
    assert float(report.sums["trained"]) == batch.loss_weights.sum()
    assert int(report.sums["tokens"]) == (batch.segment_ids > 0).sum()
    assert int(report.sums["rows"]) == 16
    for path, gradient in run.gradients().items():
        assert tiny_steps.distance(gradient, np.asarray(expected[path])) < 1e-5, path


@pytest.mark.parametrize(("mesh", "portions"), [({"data": 2, "fsdp": 4}, 2), ({"data": 8}, 1)])
def test_an_evaluation_sums_the_same_names(mesh: Mapping[str, int], portions: int) -> None:
    run, batch = _start(mesh, portions), tiny_steps.batch(rows=16)
    found = make_eval_step(run.config)(run.state.trainable, run.frozen, batch)
    one = _start(None, 1)
    expected = make_eval_step(one.config)(one.state.trainable, one.frozen, batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.slow
def test_a_run_logs_shows_resumes_and_evaluates_its_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brief = {"max_steps": 4, "eval_steps": 2}
    rates = {"lr_scheduler_type": "constant"}  # which does not ask for the run's length
    config = small_run.write_inputs(tmp_path, "lora", training=brief, optimizer=rates)
    keys = ["export.format=null", "logging.logging_steps=1", "mesh.data=8", "mesh.fsdp=1"]
    words = ["--config", str(config), *keys]
    assert train.main(words) == 0
    run, said = tmp_path / "run", capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [list(line) for line in training] == 4 * [
        [
            *("step", "epoch", "loss", "z_loss", "learning_rate", "grad_norm"),
            *("tokens", "tokens_per_second", "mfu", "step_time", "filled_rows", "time"),
        ]
    ]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [list(line) for line in evaluations] == 2 * [
        ["step", "eval_loss", "eval_z_loss", "eval_z_root", "time"]
    ]
    for line in evaluations:
        assert line["eval_z_root"] == math.sqrt(line["eval_z_loss"])
    assert f"loss {training[0]['loss']:.4f} | z {training[0]['z_loss']:.2f} | lr" in said
    assert f"| filled {training[0]['filled_rows']} |" in said
    assert f"| eval z {evaluations[0]['eval_z_loss']:.2f}\n" in said

    # In two starts: the same lines, but for the evaluation at the end of the first.
    other = [*words, f"output_dir={tmp_path / 'again'}"]
    assert train.main([*other, "training.max_steps=3"]) == 0
    assert train.main(other) == 0
    found = small_run.metrics(tmp_path / "again")
    kept = [row for row in found if row["step"] != 3 or "loss" in row]
    assert kept == small_run.metrics(run)

    capsys.readouterr()
    assert evaluate.main(words) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results)[:4] == ["step", "loss", "z_loss", "z_root"]
    last = evaluations[-1]
    assert (results["loss"], results["z_loss"]) == (last["eval_loss"], last["eval_z_loss"])
    assert json.loads((run / "eval_results.json").read_text())["eval_z_root"] == last["eval_z_root"]


def test_a_checkpoint_of_other_sums_is_refused() -> None:
    saved = Meter(TOY).state()
    Meter(TOY).restore(saved)
    with pytest.raises(ConfigError, match="with sums of loss, tokens, trained, z, expected"):
        Meter(SFT).restore(saved)


def test_keys_of_another_objective_are_named_as_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ObjectiveSection(aux_loss_alpha=0.5)
    assert unused_keys(options, {}) == ["objective.aux_loss_alpha"]
    assert unused_keys(ObjectiveSection(), {}) == []
    monkeypatch.setitem(OBJECTIVES, "sft", replace(SFT, unused_keys=TOY.unused_keys))
    assert unused_keys(options, {}) == []


def test_a_field_that_batches_lack_is_found_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lacking: Any = replace(TOY, batch_fields=("input_ids", "rejected_ids"))
    monkeypatch.setitem(OBJECTIVES, "sft", lacking)
    with pytest.raises(AssertionError, match="the rows lack what it reads"):
        _start(None, 1)
