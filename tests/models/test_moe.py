# SPDX-License-Identifier: Apache-2.0
"""Balance losses are the papers' formulas, are means over rows, and reach the router alone.

And rows go to their experts and come back as plain indexing says, gradients included.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from flax import nnx

from dsjax.models import moe
from dsjax.models.moe import Router, RouterConfig

EXPERTS, CHOSEN, HIDDEN = 8, 3, 12
KINDS = {
    "v2": ("softmax", "group_limited_greedy"),
    "v3": ("sigmoid", "noaux_tc"),
}


def _router(kind: str) -> nnx.Module:
    """A router with random weights, and a bias that changes what is chosen."""
    scoring, method = KINDS[kind]
    config = RouterConfig(EXPERTS, CHOSEN, scoring, method, 4, 2, False, 1.0)
    router = Router(config, HIDDEN, layers=1)
    rng = np.random.default_rng(0)
    values: dict[Any, Any] = {("weight",): rng.normal(size=(EXPERTS, HIDDEN))}
    if kind == "v3":
        values[("e_score_correction_bias",)] = rng.normal(size=EXPERTS)
    arrays = {key: jnp.asarray(value, jnp.float32) for key, value in values.items()}
    return nnx.merge(nnx.graphdef(router), nnx.from_flat_state(arrays))


def _by_the_formula(kind: str, logits: np.ndarray, experts: np.ndarray) -> float:
    """One row's loss, token by token and expert by expert."""
    tokens, total = len(logits), 0.0
    scores = 1 / (1 + np.exp(-logits))
    if kind == "v2":
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for expert in range(EXPERTS):
        count, score = 0, 0.0
        for token in range(tokens):
            best = experts[token] if kind == "v2" else np.argsort(-scores[token])[:CHOSEN]
            count += expert in best
            score += scores[token, expert] / (1 if kind == "v2" else scores[token].sum())
        total += EXPERTS / (CHOSEN * tokens) * count * score / tokens
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_the_balance_of_a_row_is_the_formulas(kind: str) -> None:
    router = _router(kind)
    rng = np.random.default_rng(1)
    x_BTD = rng.normal(size=(3, 10, HIDDEN)).astype(np.float32)
    real_BT = np.arange(10) < np.array([[10], [7], [0]])

    routing, work = router(jnp.asarray(x_BTD), jnp.asarray(real_BT))

    logits = x_BTD @ np.asarray(router.weight[...]).T
    experts = np.asarray(routing.experts)
    expected = [
        _by_the_formula(kind, logits[row, :n], experts[row, :n]) for row, n in ((0, 10), (1, 7))
    ]
    np.testing.assert_allclose(work.balance, [*expected, 0.0], rtol=1e-5)
    assert max(expected) > 1.05
    counts = np.bincount(experts[real_BT].reshape(-1), minlength=EXPERTS)
    np.testing.assert_array_equal(work.tokens_per_expert, counts)


def test_all_experts_alike_give_one() -> None:
    router = _router("v2")
    router.weight[...] = jnp.zeros((EXPERTS, HIDDEN))
    _, work = router(jnp.ones((1, 4, HIDDEN)), jnp.ones((1, 4), bool))
    np.testing.assert_allclose(work.balance, 1.0, rtol=1e-6)


def _gradients(alpha: float, mesh: dict[str, int] | None = None, pieces: int = 1) -> dict:
    training = {"batch_size": 8, "gradient_accumulation_steps": pieces}
    run = tiny_steps.start(
        tiny_steps.V3, mesh=mesh, training=training, objective={"aux_loss_alpha": alpha}
    )
    report = run.step(tiny_steps.batch())
    return run.gradients() | {"loss": np.asarray(report.sums["loss"])}


@pytest.mark.slow
def test_the_loss_is_in_the_gradients_and_not_in_what_is_logged() -> None:
    alpha, plain, balanced = 0.5, _gradients(0.0), _gradients(0.5)
    assert plain["loss"] == balanced["loss"]
    run, batch = tiny_steps.start(tiny_steps.V3), tiny_steps.batch()

    def mean(trainable: Any) -> jax.Array:
        model = run.config.partition.merge(trainable, run.frozen)
        places = (batch.input_ids, batch.position_ids, batch.segment_ids)
        hidden = model.hidden(*map(jnp.asarray, places))
        return jnp.sum(jnp.mean(hidden.work.balance, axis=1))

    alone = jax.jit(jax.grad(mean))(run.state.trainable)
    for path, gradient in alone.items():
        added = balanced[path] - plain[path]
        size = np.linalg.norm(plain[path]) + alpha * np.linalg.norm(gradient)
        assert np.linalg.norm(added - alpha * np.asarray(gradient)) < 1e-5 * size, path
    assert np.linalg.norm(alone["model.layers.mlp.gate.weight"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "pieces"), [(None, 4), ({"expert": 2, "tensor": 2, "data": 2}, 1)]
)
def test_it_is_a_mean_over_the_rows_of_the_batch(mesh: dict[str, int] | None, pieces: int) -> None:
    expected, found = _gradients(0.5), _gradients(0.5, mesh, pieces)
    for path, gradient in expected.items():
        assert tiny_steps.distance(found[path], gradient) < 1e-5, path


def test_rows_are_sorted_by_group_and_keep_their_order_in_it() -> None:
    group = np.random.default_rng(0).integers(0, 5, 40)
    order = moe._sorted_by(jnp.asarray(group, jnp.int32), 5)
    np.testing.assert_array_equal(order, np.argsort(group, kind="stable"))


@pytest.mark.parametrize("times", [1, 3])
def test_the_gradient_of_rows_in_order_is_that_of_plain_indexing(times: int) -> None:
    rng = np.random.default_rng(0)
    x_TD, y_ZD = (jnp.asarray(rng.normal(size=(n, 4)), jnp.float32) for n in (10, 10 * times))
    order = rng.permutation(10 * times)
    back = jnp.asarray(np.argsort(order))

    ours, pull = jax.vjp(lambda x: moe._rows_in_order(x, jnp.asarray(order), back), x_TD)
    expected, pull_plain = jax.vjp(lambda x: x[order // times], x_TD)

    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(pull(y_ZD)[0], pull_plain(y_ZD)[0], rtol=1e-6, atol=1e-6)
