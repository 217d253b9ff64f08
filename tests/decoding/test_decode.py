# SPDX-License-Identifier: Apache-2.0
"""A row's tokens depend on its prompt, the seed and the row's number, on nothing beside it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import dsjax
from dsjax.config import MeshSection
from dsjax.decoding.decode import generate, padded
from dsjax.distributed.mesh import make_mesh
from dsjax.errors import ConfigError
from dsjax.models import Model

NEW = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_checkpoint(tmp_path_factory.mktemp("model"), "qwen2_window")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return dsjax.load_pretrained(str(checkpoint), dtype="float32")


def prompts() -> list[list[int]]:
    return [tiny.random_ids(280, 1, length, seed=length)[0].tolist() for length in (5, 30, 16)]


def test_a_batch_gives_each_prompts_own_tokens(model: Model):
    batch = generate(model, prompts(), max_new_tokens=NEW, stop_ids=[])
    alone = [generate(model, [p], max_new_tokens=NEW, stop_ids=[])[0] for p in prompts()]
    assert batch == alone
    assert [len(row) for row in batch] == [NEW] * 3


def test_the_cache_gives_the_tokens_of_reading_everything_again(model: Model):
    prompt = prompts()[0]
    ids = prompt + generate(model, [prompt], max_new_tokens=NEW, stop_ids=[])[0]
    logits = np.asarray(model(jnp.asarray([ids])))[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ids[len(prompt) :]


def test_draws_depend_on_the_seed_and_the_row_alone(model: Model):
    options = {"max_new_tokens": NEW, "stop_ids": [], "temperature": 1.5, "top_p": 0.95}
    twins = [prompts()[0], prompts()[0], prompts()[1]]
    drawn = generate(model, twins, seed=3, **options)
    assert drawn[0] != drawn[1]
    assert generate(model, twins[:1], seed=3, **options) == drawn[:1]
    assert generate(model, twins, seed=4, **options) != drawn


def test_tokens_are_told_as_they_come_and_a_row_can_be_ended(model: Model):
    told: list[tuple[int, int]] = []

    def on_token(row: int, token: int) -> bool:
        told.append((row, token))
        return row == 0 and len([r for r, _ in told if r == 0]) == 4

    rows = generate(model, prompts(), max_new_tokens=NEW, stop_ids=[], on_token=on_token)

    assert [len(row) for row in rows] == [4, NEW, NEW]
    assert [row for row, _ in told[:6]] == [0, 1, 2, 0, 1, 2]
    assert [[t for r, t in told if r == row] for row in range(3)] == rows


def test_a_stop_token_is_the_last(model: Model):
    free = generate(model, prompts(), max_new_tokens=NEW, stop_ids=[])
    stop = free[1][4]
    for row, ended in zip(
        free, generate(model, prompts(), max_new_tokens=NEW, stop_ids=[stop]), strict=True
    ):
        assert ended == (row[: row.index(stop) + 1] if stop in row else row)


def test_devices_share_the_work(checkpoint: Path, model: Model):
    mesh = make_mesh(MeshSection(fsdp=2, tensor=2), jax.devices()[:4])
    shared = dsjax.load_pretrained(str(checkpoint), dtype="float32", mesh=mesh)
    expected = generate(model, prompts(), max_new_tokens=NEW, stop_ids=[])
    assert generate(shared, prompts(), max_new_tokens=NEW, stop_ids=[]) == expected


def test_lengths_are_powers_of_two():
    ids, lengths = padded([[1, 2, 3], list(range(17))])
    assert (ids.shape, lengths.tolist()) == ((2, 32), [3, 17])
    assert padded([[1] * 16])[0].shape == (1, 16)
    assert padded([[1]])[0].shape == (1, 16)


def test_no_prompts_no_tokens(model: Model):
    assert generate(model, [], max_new_tokens=NEW, stop_ids=[]) == []


def test_what_is_wrong_is_refused_together(model: Model):
    with pytest.raises(ConfigError) as error:
        generate(model, [[1]], max_new_tokens=0, stop_ids=[], temperature=-1.0)
    assert "max_new_tokens: got 0, expected an integer >= 1" in str(error.value)
    assert "temperature: got -1.0" in str(error.value)


def test_prompts_that_the_model_cannot_read(model: Model):
    with pytest.raises(ConfigError) as error:
        generate(model, [[1], [], [5, 288]], max_new_tokens=1, stop_ids=[])
    assert str(error.value).splitlines() == [
        "prompt 2: got no token, expected at least one",
        "prompt 3: got token 288, expected ids from 0 to 287; the tokenizer belongs to another "
        "model",
    ]
