# SPDX-License-Identifier: Apache-2.0
"""The loss of the token after the next: whose tokens count, on any mesh, and beside the loss."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tiny_steps

from dsjax.data import Batch
from dsjax.models import base_shapes, build, entries_of, predict_ahead
from dsjax.objectives import objective_of
from dsjax.objectives.multi_token import shifted
from dsjax.training.partition import make_partition

AHEAD: dict[str, Any] = {"mtp_loss_weight": 0.5, "bias_update_speed": 0.125}


def test_a_place_takes_what_stands_at_the_next_of_its_segment() -> None:
    row = {
        "input_ids": [5, 6, 7, 8, 9, 3, 0, 0],
        "targets": [6, 7, 0, 9, 3, 0, 0, 0],
        "loss_weights": [0.5, 2.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        "segment_ids": [1, 1, 1, 2, 2, 2, 0, 0],
        "position_ids": [0, 1, 2, 0, 1, 2, 0, 0],
    }
    types = {name: np.float32 if name == "loss_weights" else np.int32 for name in row}
    batch = Batch(**{name: np.asarray([row[name]], types[name]) for name in row})

    after = shifted(batch)

    kept = [True, True, False, True, True, False, False, False]
    assert np.asarray(after.segment_ids)[0].tolist() == [1, 1, 0, 2, 2, 0, 0, 0]
    assert np.asarray(after.input_ids)[0, kept].tolist() == [6, 7, 9, 3]
    assert np.asarray(after.loss_weights)[0].tolist() == [2.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert np.asarray(after.targets)[0, [0, 3]].tolist() == [7, 3]
    assert after.position_ids is batch.position_ids


def _start(
    mesh: Mapping[str, int] | None = None, pieces: int = 1, **changes: Any
) -> tiny_steps.Run:
    training = {"batch_size": 8, "gradient_accumulation_steps": pieces}
    objective = AHEAD | {"aux_loss_alpha": 0.25}
    return tiny_steps.start(
        tiny_steps.V3, mesh=mesh, training=training, objective=objective, **changes
    )


def _two_steps(
    run: tiny_steps.Run,
) -> tuple[tiny_steps.Outcome, list[float], dict[str, np.ndarray]]:
    """Two steps; besides their outcome the sums ahead of the second, and the routers' biases."""
    report = run.step(tiny_steps.batch())
    gradients = run.gradients()
    ahead = run.step(tiny_steps.batch(seed=1)).sums
    outcome = tiny_steps.Outcome(float(report.sums["loss"]), gradients, run.trainable())
    biases = {path: outcome.trained[path] for path in run.config.partition.router_biases}
    return (
        outcome,
        [float(ahead[f"mtp_{name}"].sum()) for name in ("loss", "weight", "tokens_per_expert")],
        biases,
    )


@functools.cache
def _one_device() -> tuple[tiny_steps.Outcome, list[float], dict[str, np.ndarray]]:
    return _two_steps(_compiled().fresh())


@functools.cache
def _compiled() -> tiny_steps.Run:
    """One device's run before its first step."""
    return _start().compile(tiny_steps.batch())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "pieces"),
    [
        ({"expert": 2, "data": 2}, 2),
        (None, 4),
        ({"fsdp": 2, "tensor": 2}, 1),
    ],
)
def test_a_mesh_and_portions_give_the_result_of_one_device(
    mesh: dict[str, int] | None, pieces: int
) -> None:
    expected, sums, biases = _one_device()
    found, own_sums, own_biases = _two_steps(_start(mesh, pieces))
    tiny_steps.assert_same(found, expected)
    assert own_sums == pytest.approx(sums, rel=1e-5)
    assert len(biases) == 2
    for path, bias in biases.items():
        np.testing.assert_array_equal(own_biases[path], bias)


@pytest.mark.slow
def test_sums_are_over_the_tokens_whose_next_is_of_their_segment() -> None:
    run, batch = _compiled().fresh(), tiny_steps.batch()
    bias = "mtp.block.mlp.gate.e_score_correction_bias"
    before = run.trainable()[bias]
    sums = run.step(batch).sums
    after, inside = shifted(batch), batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    inside &= batch.segment_ids[:, :-1] > 0
    assert float(sums["mtp_weight"]) == batch.loss_weights[:, 1:][inside].sum()
    assert float(sums["mtp_weight"]) == float(after.loss_weights.sum())
    loads = np.asarray(sums["mtp_tokens_per_expert"])
    assert loads.shape == (1, 8) and loads.sum() == 3 * inside.sum()
    moved = AHEAD["bias_update_speed"] * np.sign(loads.mean() - loads)
    np.testing.assert_array_equal(run.trainable()[bias], before + moved.astype(np.float32))


@pytest.mark.slow
def test_the_main_loss_is_the_one_without() -> None:
    plain = tiny_steps.start(tiny_steps.V3)
    expected = plain.step(tiny_steps.batch()).sums
    found = _one_device()[0]
    assert found.loss == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert not any(name.startswith("mtp_") for name in expected)
    assert not any(path.startswith("mtp.") for path in plain.config.partition.leaves)


def _model(ahead: bool = True, **changes: Any) -> Any:
    model = build(tiny_steps.SHAPE | tiny_steps.V3 | changes, "float32")
    if ahead:
        predict_ahead(model)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_written_twice_and_read_once(tied: bool) -> None:
    model = _model(tie_word_embeddings=tied)
    copies = {entry.hf: entry.path for entry in entries_of(model) if entry.copy}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert copies == {
        "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight": head,
    }
    names = [entry.hf for entry in entries_of(model)]
    assert len(set(names)) == len(names)
    assert "model.layers.3.mlp.experts.7.up_proj.weight" in names
    others = {name for name in names if not name.startswith("model.layers.3.")}
    plain = entries_of(_model(False, tie_word_embeddings=tied))
    assert {entry.hf for entry in plain} == others


def test_freezing_layer_and_embedding_are_two_things() -> None:
    module = make_partition(_model(), freeze=["model.layers.3"])
    assert set(module.frozen) == {
        *(path for path in module.leaves if path.startswith("mtp.")),
        "model.layers.mlp.gate.e_score_correction_bias",
    }
    assert module.layer_masks == {}
    embedding = make_partition(_model(), freeze=["model.embed_tokens"], balance=True)
    assert embedding.frozen == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("first_dense", [1, 9])
def test_the_layer_is_of_the_kind_that_comes_next(first_dense: int) -> None:
    paths = base_shapes(_model(first_k_dense_replace=first_dense))
    assert ("mtp.block.mlp.gate.weight" in paths) == (first_dense == 1)
    assert ("mtp.block.mlp.up_proj.weight" in paths) == (first_dense == 9)


V2 = {"model_type": "deepseek_v2", "topk_method": "greedy", "num_nextn_predict_layers": 1}


@pytest.mark.parametrize(
    ("shape", "peft_type", "said"),
    [
        ({"model_type": "llama"}, None, ["0.125 for a model of model_type llama without e_score"]),
        (V2, None, ["of model_type deepseek_v2 without", "for model_type deepseek_v2, expected 0"]),
        ({"first_k_dense_replace": 3}, None, ["of model_type deepseek_v3 without e_score"]),
        ({}, "LORA", ["update_speed: got 0.125 with LORA", "loss_weight: got 0.5 with LORA"]),
        ({}, "PREFIX_TUNING", ["got 0.5 with PREFIX_TUNING, expected 0"]),
        ({"num_nextn_predict_layers": 0}, None, ["num_nextn_predict_layers 0, expected 0; one"]),
        ({"num_nextn_predict_layers": 2}, None, ["num_nextn_predict_layers 2, expected 0; one"]),
    ],
)
def test_what_a_model_cannot_have_is_refused(
    shape: dict[str, Any], peft_type: str | None, said: list[str]
) -> None:
    section, model = tiny_steps.run_config(objective=AHEAD).objective, _model(False, **shape)
    problems = "\n".join(objective_of(section).problems(section, model, peft_type))
    for part in said:
        assert part in problems
    default = tiny_steps.run_config().objective
    assert objective_of(default).problems(default, model, peft_type) == []
