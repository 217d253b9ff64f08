# SPDX-License-Identifier: Apache-2.0
"""What may be drawn is what transformers' logits processors leave, and draws follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dsjax.decoding.sampling import Sampling, filter_logits, row_keys, sample, sampling_problems


def reference(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The three processors in the order in which transformers applies them."""
    ids, scores = torch.zeros((len(logits), 1), dtype=torch.long), torch.tensor(logits)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p is not None and sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.numpy()


@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 5, 40, 100]),
    top_p=st.sampled_from([None, 0.01, 0.5, 0.9, 0.999, 1.0]),
)
def test_what_is_left_is_what_transformers_leaves(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 2, (3, 40)).astype(np.float32)
    sampling = Sampling(temperature, top_k, top_p)

    ours, theirs = filter_logits(jnp.asarray(logits), sampling), reference(logits, sampling)

    np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_token_that_crosses_top_p_is_kept():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    for top_p, kept in ((0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4), (1e-6, 1)):
        left = filter_logits(logits, Sampling(1.0, None, top_p))
        assert np.isfinite(left).sum() == kept


def test_of_tied_tokens_top_p_keeps_no_more_than_it_needs():
    left = filter_logits(jnp.zeros((1, 10)), Sampling(1.0, None, 0.25))
    assert np.isfinite(left).sum() == 3


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    rows = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (rows, 4))

    drawn = np.asarray(sample(logits, row_keys(0, rows), Sampling(1.0)))

    shares = np.bincount(drawn, minlength=4) / rows
    # Four standard deviations of a share.
    np.testing.assert_array_less(
        np.abs(shares - probabilities), 4 * np.sqrt(probabilities * (1 - probabilities) / rows)
    )


def test_temperature_zero_takes_the_likeliest():
    logits = jax.random.normal(jax.random.key(0), (5, 30))
    picked = sample(logits, row_keys(0, 5), Sampling())
    np.testing.assert_array_equal(picked, np.argmax(logits, axis=-1))


def test_a_rows_draws_do_not_depend_on_the_others():
    logits = jnp.zeros((6, 100))
    all_rows = sample(logits, row_keys(7, 6), Sampling(1.0))
    assert len(set(all_rows.tolist())) > 1
    np.testing.assert_array_equal(sample(logits[:2], row_keys(7, 2), Sampling(1.0)), all_rows[:2])


@pytest.mark.parametrize(
    ("sampling", "seed", "says"),
    [
        (Sampling(-1.0), 0, "temperature: got -1.0, expected a number >= 0"),
        (Sampling(float("inf")), 0, "temperature: got inf"),
        (Sampling(1.0, 0), 0, "top_k: got 0, expected an integer >= 1"),
        (Sampling(1.0, None, 1.5), 0, "top_p: got 1.5, expected a number above 0 and at most 1"),
        (Sampling(1.0, None, 0.0), 0, "top_p: got 0.0"),
        (Sampling(0.0, 5, 0.9), 0, "temperature: got 0 (greedy) with top_k and top_p"),
        (Sampling(), 2**32, "seed: got 4294967296, expected an integer from 0 to 4294967295"),
    ],
)
def test_wrong_numbers(sampling: Sampling, seed: int, says: str):
    problems = sampling_problems(sampling, seed)
    assert len(problems) == 1
    assert says in problems[0]


def test_right_numbers():
    assert sampling_problems(Sampling(0.7, 40, 1.0), 0) == []
