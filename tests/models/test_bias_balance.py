# SPDX-License-Identifier: Apache-2.0
"""Routers' biases move by the experts' loads, by nothing else, and only where asked to."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps

from dsjax.adapters.lora import LoraConfig
from dsjax.errors import ConfigError
from dsjax.models import build
from dsjax.training.loss_scale import LossScale
from dsjax.training.partition import make_partition, report

BIAS = "model.layers.mlp.gate.e_score_correction_bias"
SPEED = 0.125


def _start(**changes: Any) -> tiny_steps.Run:
    return tiny_steps.start(tiny_steps.V3, objective={"bias_update_speed": SPEED}, **changes)


@functools.cache
def _compiled() -> tiny_steps.Run:
    """One device's run before its first step."""
    return _start().compile(tiny_steps.batch())


def _expected(bias_LE: np.ndarray, loads_LE: np.ndarray) -> np.ndarray:
    """The bias after a step, expert by expert."""
    moved = bias_LE.copy()
    for layer, loads in enumerate(loads_LE.tolist()):
        for expert, load in enumerate(loads):
            mean = sum(loads) / len(loads)
            moved[layer, expert] += SPEED * ((load < mean) - (load > mean))
    return moved


def test_a_bias_moves_against_its_experts_load() -> None:
    run, batch = _compiled().fresh(), tiny_steps.batch()
    before = run.trainable()[BIAS]

    first = np.asarray(run.step(batch).sums["tokens_per_expert"])
    once = run.trainable()[BIAS]
    second = np.asarray(run.step(tiny_steps.batch(seed=1)).sums["tokens_per_expert"])

    np.testing.assert_array_equal(once, _expected(before, first))
    np.testing.assert_array_equal(run.trainable()[BIAS], _expected(once, second))
    real = int((batch.segment_ids > 0).sum())
    assert first.sum(axis=1).tolist() == [real * 3] * 2  # tokens x experts of each
    assert once.dtype == np.float32 and (once != before).sum() > 10


def test_experts_at_the_mean_and_batches_without_tokens_move_nothing() -> None:
    run = _compiled().fresh()
    empty = tiny_steps.batch()._replace(segment_ids=np.zeros((8, 24), np.int32))
    before = run.trainable()[BIAS]
    run.step(empty._replace(loss_weights=np.zeros((8, 24), np.float32)))
    np.testing.assert_array_equal(run.trainable()[BIAS], before)


@pytest.mark.slow
def test_optimizer_decay_and_norm_do_not_know_of_it() -> None:
    optimizer = {"weight_decay": 0.5, "adam_epsilon": 0.0, "max_grad_norm": 0.1}
    run, plain = _start(optimizer=optimizer), tiny_steps.start(tiny_steps.V3, optimizer=optimizer)
    batch = tiny_steps.batch()
    before = run.trainable()[BIAS]

    found, expected = run.step(batch), plain.step(batch)

    assert BIAS not in run.state.opt_state[0].mu
    assert float(found.grad_norm) == float(expected.grad_norm)
    np.testing.assert_array_equal(
        run.trainable()[BIAS], _expected(before, np.asarray(found.sums["tokens_per_expert"]))
    )
    for path, array in plain.trainable().items():
        assert array.tobytes() == run.trainable()[path].tobytes(), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "pieces"), [(None, 4), ({"data": 2}, 2), ({"expert": 2, "data": 2, "tensor": 2}, 1)]
)
def test_loads_are_those_of_the_whole_batch(mesh: dict[str, int] | None, pieces: int) -> None:
    training = {"batch_size": 8, "gradient_accumulation_steps": pieces}
    run = _start(mesh=mesh, training=training)
    for expected in _two_biases():
        run.step(tiny_steps.batch(seed=int(run.state.step)))
        np.testing.assert_array_equal(run.trainable()[BIAS], expected)


@functools.cache
def _two_biases() -> list[np.ndarray]:
    """The bias after each of two steps on one device."""
    run, biases = _compiled().fresh(), []
    for seed in range(2):
        run.step(tiny_steps.batch(seed=seed))
        biases.append(run.trainable()[BIAS])
    return biases


def _scale(scale: float) -> LossScale:
    return LossScale(jnp.float32(scale), jnp.int32(0), jnp.int32(0))


@pytest.mark.slow
def test_a_skipped_float16_step_moves_nothing() -> None:
    run = _start(model={"dtype": "float16"})
    before = run.trainable()[BIAS]
    run.state = run.state._replace(loss_scale=_scale(2.0**100))
    report = run.step(tiny_steps.batch())
    assert int(report.skipped) == 1
    np.testing.assert_array_equal(run.trainable()[BIAS], before)

    run.state = run.state._replace(loss_scale=_scale(1.0))
    loads = np.asarray(run.step(tiny_steps.batch()).sums["tokens_per_expert"])
    np.testing.assert_array_equal(run.trainable()[BIAS], _expected(before, loads))


@pytest.mark.slow
def test_a_frozen_layer_keeps_its_bias() -> None:
    run = _start(training={"freeze": ["model.layers.1.mlp.gate.e_score_correction_bias"]})
    before = run.trainable()[BIAS]
    assert run.config.partition.layer_masks[BIAS].tolist() == [False, True]
    loads = np.asarray(run.step(tiny_steps.batch()).sums["tokens_per_expert"])
    after, moved = run.trainable()[BIAS], _expected(before, loads)
    assert after[0].tobytes() == before[0].tobytes()
    np.testing.assert_array_equal(after[1], moved[1])


def test_the_table_tells_of_it() -> None:
    model = build(tiny_steps.SHAPE | tiny_steps.V3, "float32")
    plain = make_partition(model)
    moving = make_partition(model, param_dtype="bfloat16", balance=True)
    some = make_partition(model, freeze=["model.layers.2.mlp.gate"], balance=True)

    assert plain.router_biases == () and BIAS in plain.frozen
    assert moving.router_biases == (BIAS,) and set(moving.trainable) - set(plain.trainable) == {
        BIAS
    }
    assert moving.gradient_params == plain.trainable
    rows = {row[0]: row[1:] for row in report(moving)}
    assert rows[BIAS] == ("2 x 8", "float32", 16, 16)
    assert {row[0]: row[3:] for row in report(some)}[BIAS] == (8, 16)


def test_an_adapter_leaves_it_frozen() -> None:
    run = _start(adapter=LoraConfig(r=2, lora_alpha=2, target_modules=["o_proj"]))
    assert run.config.partition.router_biases == () and BIAS in run.config.partition.frozen


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        (["mlp.gate"], "freezes every e_score_correction_bias, expected at least one left to move"),
        (["lm_head", r"model\.(?!.*e_score).*"], "freezes every tensor, expected at least one"),
    ],
)
def test_freezing_what_should_move_is_refused(freeze: list[str], said: str) -> None:
    model = build(tiny_steps.SHAPE | tiny_steps.V3, "float32")
    with pytest.raises(ConfigError, match=said):
        make_partition(model, freeze=freeze, balance=True)
