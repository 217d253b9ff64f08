# SPDX-License-Identifier: Apache-2.0
"""The step moves exactly what trains, by exactly the big batch's gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps

from dsjax.adapters.lora import LoraConfig
from dsjax.distributed.sharding import Leaf
from dsjax.models.slots import Dropout
from dsjax.training.evaluation import make_eval_step
from dsjax.training.loss_scale import FIRST_LOSS_SCALE, GROW_AFTER, LossScale
from dsjax.training.optimizer import make_schedule
from dsjax.training.state import abstract_state

ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def _bytes(arrays: dict[str, Any]) -> dict[str, bytes]:
    return {path: np.asarray(array).tobytes() for path, array in arrays.items()}


@pytest.mark.parametrize(
    ("mesh", "counts"),
    [(None, (1, 4)), pytest.param({"data": 2}, (1, 2, 4), marks=pytest.mark.slow)],
)
def test_accumulation_gives_the_update_of_the_big_batch(
    mesh: dict[str, int] | None, counts: tuple[int, ...]
) -> None:
    batch = tiny_steps.batch()
    outcomes = []
    for pieces in counts:
        training = {"batch_size": 8, "gradient_accumulation_steps": pieces}
        run = tiny_steps.start(adapter=ADAPTER, mesh=mesh, training=training)
        report = run.step(batch)
        outcomes.append((report, run.gradients(), run.trainable()))

    (whole, gradients, trained), *others = outcomes
    for report, own_gradients, own_trained in others:
        assert float(report.sums["loss"]) == pytest.approx(float(whole.sums["loss"]), rel=1e-6)
        assert float(report.sums["weight"]) == batch.loss_weights.sum()
        assert int(report.sums["tokens"]) == (batch.segment_ids > 0).sum()
        assert float(report.grad_norm) == pytest.approx(float(whole.grad_norm), rel=1e-6)
        for path in gradients:
            # In float64 all of them agree to 2e-15; in float32 each is about 1e-6 from that.
            assert tiny_steps.distance(own_gradients[path], gradients[path]) < 2e-6, path
            assert tiny_steps.distance(own_trained[path], trained[path]) < 1e-6, path


def test_an_adapter_trains_alone_at_the_rate_that_is_told() -> None:
    course = {"learning_rate": 0.5, "warmup_steps": 2, "lr_scheduler_type": "cosine"}
    run = tiny_steps.start(adapter=ADAPTER, optimizer=course | {"weight_decay": 0.5})
    frozen, before = _bytes(run.frozen), run.trainable()

    rates = [float(run.step(tiny_steps.batch()).learning_rate)]
    assert _bytes(run.trainable()) == _bytes(before)  # the warm-up's first rate is 0
    rates += [float(run.step(tiny_steps.batch()).learning_rate) for _ in range(3)]

    schedule = make_schedule(tiny_steps.run_config(optimizer=course).optimizer, 100)
    np.testing.assert_array_equal(rates, [schedule(step) for step in range(4)])
    assert _bytes(run.frozen) == frozen
    assert all(".lora_" in path for path in before)
    assert set(run.state.opt_state[0].mu) == set(run.state.opt_state[0].nu) == set(before)
    assert all((array != before[path]).any() for path, array in run.trainable().items())


def _with_negative_zeros(path: str, leaf: Leaf) -> np.ndarray:
    """-0 becomes +0 when anything is added to it."""
    values = tiny_steps.random_array(path, leaf)
    values.reshape(-1)[::3] = -0.0
    return values


@pytest.mark.parametrize(
    "param_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_frozen_layers_of_a_trained_stack_keep_their_bytes(param_dtype: str) -> None:
    run = tiny_steps.start(
        model={"dtype": "bfloat16", "param_dtype": param_dtype},
        optimizer={"weight_decay": 0.5},
        training={"freeze": ["model.layers.0", "lm_head"]},
        values=_with_negative_zeros,
    )
    before, frozen = run.trainable(), _bytes(run.frozen)

    report = run.step(tiny_steps.batch())
    squares = [float((gradient**2).sum(dtype=np.float64)) for gradient in run.gradients().values()]
    assert float(report.grad_norm) == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    run.step(tiny_steps.batch(seed=1))

    assert set(frozen) == {"lm_head.weight"} and _bytes(run.frozen) == frozen
    stacks = 0
    for path, array in run.trainable().items():
        assert array.dtype == param_dtype
        if path.startswith("model.layers."):
            stacks += 1
            assert array[0].tobytes() == before[path][0].tobytes(), path
            assert (array[1] != before[path][1]).any(), path
            for moments in (run.state.opt_state[0].mu, run.state.opt_state[0].nu):
                assert moments[path].dtype == jnp.float32
                assert not np.asarray(moments[path])[0].any(), path
        else:
            assert (array != before[path]).any(), path
    assert stacks == 9


def test_float16_skips_an_overflow_and_finds_its_scale() -> None:
    exact = tiny_steps.start(adapter=ADAPTER)
    exact.step(tiny_steps.batch())
    run = tiny_steps.start(
        adapter=ADAPTER,
        model={"dtype": "float16"},
        optimizer={"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    )
    start = run.state.trainable
    assert float(run.state.loss_scale.scale) == FIRST_LOSS_SCALE
    before, moments = run.trainable(), jax.tree.map(np.array, run.state.opt_state)

    zero = jnp.int32(0)
    run.state = run.state._replace(loss_scale=LossScale(jnp.float32(2.0**100), zero + 5, zero))
    report = run.step(tiny_steps.batch())

    assert not np.isfinite(report.grad_norm) and int(report.skipped) == 1
    assert (float(report.sums["loss"]), float(report.sums["weight"])) == (0.0, 0.0)
    assert run.state.loss_scale == (2.0**99, 0, 1) and int(run.state.step) == 1
    assert all(array.is_deleted() for array in start.values())
    assert _bytes(run.trainable()) == _bytes(before)
    jax.tree.map(np.testing.assert_array_equal, run.state.opt_state, moments)

    run.state = run.state._replace(
        loss_scale=run.state.loss_scale._replace(
            scale=jnp.float32(FIRST_LOSS_SCALE), good_steps=jnp.int32(GROW_AFTER - 1)
        )
    )
    report = run.step(tiny_steps.batch())

    assert float(report.learning_rate) == 0.0  # a skipped step is no step of the warm-up
    assert run.state.loss_scale == (2 * FIRST_LOSS_SCALE, 0, 1)
    for path, gradient in exact.gradients().items():
        ours = np.asarray(run.state.opt_state[0].mu[path]) / np.float32(0.1)
        assert tiny_steps.distance(ours, gradient) < 1e-2, path

    report = run.step(tiny_steps.batch())
    assert float(report.learning_rate) == pytest.approx(0.005)
    assert run.state.loss_scale == (2 * FIRST_LOSS_SCALE, 1, 1)
    assert all((array != before[path]).any() for path, array in run.trainable().items())


@pytest.mark.parametrize("optim", ["adamw", "lion"])
@pytest.mark.parametrize(
    ("adapter", "model", "base", "trained"),
    [
        (None, {"dtype": "bfloat16"}, None, "float32"),
        (None, {"dtype": "bfloat16", "param_dtype": "bfloat16"}, None, "bfloat16"),
        (None, {"dtype": "float32", "param_dtype": "bfloat16"}, None, "bfloat16"),
        (None, {"dtype": "float16"}, None, "float32"),
        (ADAPTER, {"dtype": "bfloat16"}, "bfloat16", "float32"),
        (ADAPTER, {"dtype": "float16"}, "float16", "float32"),
        (ADAPTER, {"dtype": "bfloat16", "param_dtype": "float32"}, "bfloat16", "float32"),
    ],
)
def test_moments_are_float32_whatever_the_weights_are_held_in(
    adapter: LoraConfig | None, model: dict[str, str], base: str | None, trained: str, optim: str
) -> None:
    run = tiny_steps.start(adapter=adapter, model=model, optimizer={"optim": optim})

    state = abstract_state(run.config)

    assert {leaf.dtype.name for leaf in state.trainable.values()} == {trained}
    frozen = {p: run.config.partition.leaves[p] for p in run.config.partition.frozen}
    assert {leaf.dtype.name for leaf in frozen.values() if leaf.kind == "base"} == (
        {base} if base else set()
    )
    moments = jax.tree.leaves(state.opt_state[0])
    assert {leaf.dtype.name for leaf in moments} == {"float32", "int32"}
    assert state.trainable.keys() == state.opt_state[0].mu.keys()
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (run.state, state))
    assert shapes[0] == shapes[1]


def test_clipping_and_a_batch_without_a_trained_token() -> None:
    run = tiny_steps.start(adapter=ADAPTER, optimizer={"max_grad_norm": 0.1})
    empty = run.fresh()
    batch = tiny_steps.batch()
    report = run.step(batch)

    clipped = run.gradients()
    squares = [float((gradient**2).sum(dtype=np.float64)) for gradient in clipped.values()]
    assert float(report.grad_norm) > 0.2
    assert sum(squares) ** 0.5 == pytest.approx(0.1, rel=1e-4)

    before = empty.trainable()
    empty.compiled = run.compiled
    report = empty.step(batch._replace(loss_weights=np.zeros_like(batch.loss_weights)))
    assert (float(report.sums["loss"]), float(report.grad_norm)) == (0.0, 0.0)
    assert _bytes(empty.trainable()) == _bytes(before)


class Masks:
    """Records every dropout mask that is drawn while a compiled function runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[bytes] = []
        draw = Dropout.keep

        def spy(dropout: Dropout, p: float, size: int) -> jax.Array:
            mask = draw(dropout, p, size)
            jax.debug.callback(lambda mask: self.drawn.append(np.asarray(mask).tobytes()), mask)
            return mask

        monkeypatch.setattr(Dropout, "keep", spy)

    def of(self, run: Callable[[], Any]) -> list[bytes]:
        """The masks that a call draws, sorted: layers run in order, callbacks need not."""
        self.drawn = []
        jax.block_until_ready(run())
        jax.effects_barrier()
        return sorted(self.drawn)


def test_dropout_differs_everywhere_and_comes_back_with_seed_and_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = Masks(monkeypatch)
    # Inputs of both modules have the same shape, so that equal keys would give equal masks.
    adapter = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.5
    )
    training = {"batch_size": 8, "gradient_accumulation_steps": 2}
    run = tiny_steps.start(adapter=adapter, training=training)
    again, reseeded, batch = run.fresh(), run.fresh(), tiny_steps.batch()

    first = masks.of(lambda: run.step(batch))
    second = masks.of(lambda: run.step(batch))

    assert len(first) == 2 * 2 * 3  # microbatches, layers, modules
    assert len(set(first + second)) == 2 * len(first)
    again.compiled = reseeded.compiled = run.compiled
    assert masks.of(lambda: again.step(batch)) == first
    key = jax.random.key_data(jax.random.key(1))
    reseeded.state = reseeded.state._replace(rng=key)
    assert not set(masks.of(lambda: reseeded.step(batch))) & set(first)
    np.testing.assert_array_equal(run.state.rng, again.state.rng)

    evaluate = make_eval_step(run.config)
    assert masks.of(lambda: evaluate(run.state.trainable, run.frozen, batch)) == []


def test_donated_state_is_used_up_and_the_batch_is_not() -> None:
    run = tiny_steps.start(adapter=ADAPTER, mesh={"fsdp": 2, "tensor": 2, "data": 2})
    old, batch = run.state, jax.tree.map(jnp.asarray, tiny_steps.batch())

    run.step(batch)  # a donation that cannot be used warns, and warnings are errors

    assert all(array.is_deleted() for array in jax.tree.leaves(old))
    assert not any(array.is_deleted() for array in jax.tree.leaves((run.frozen, batch)))


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["lora", "full"])
def test_the_program_does_not_grow_with_depth(adapter: LoraConfig | None) -> None:
    sizes = []
    for layers in (2, 12):
        run = tiny_steps.start({"num_hidden_layers": layers}, adapter)
        sizes.append(len(run.lower(tiny_steps.batch()).as_text().splitlines()))
    assert sizes[0] == sizes[1]


def _falls(param_dtype: str, steps: int) -> tuple[list[float], Any]:
    """The loss of one batch, step by step, at the rate that one would take for a real model."""
    run = tiny_steps.start(
        model={"dtype": "bfloat16", "param_dtype": param_dtype},
        optimizer={"learning_rate": 1e-5, "adam_epsilon": 1e-8},
    )
    batch = tiny_steps.batch()
    reports = [run.step(batch) for _ in range(steps)]
    losses = [float(report.sums["loss"]) / float(report.sums["weight"]) for report in reports]
    return losses, reports[-1].updates_lost


@pytest.mark.slow
@pytest.mark.parametrize("steps", [150, 500])
def test_parameters_in_bfloat16_learn_as_those_in_float32_do(steps: int) -> None:
    wide, nothing = _falls("float32", steps)
    narrow, lost = _falls("bfloat16", steps)

    fall = wide[0] - wide[-1]
    assert fall > 0.01
    assert abs((narrow[0] - narrow[-1]) - fall) < 0.1 * fall
    assert nothing is None
    assert 0.5 < float(lost) < 1.0  # of one step; the others make up for them


def test_rounding_of_parameters_differs_by_step_and_comes_back() -> None:
    run = tiny_steps.start(model={"param_dtype": "bfloat16"}, optimizer={"learning_rate": 1e-4})
    batch = tiny_steps.batch()
    run.compile(batch)
    again, later = run.fresh(), run.fresh()
    later.state = later.state._replace(step=later.state.step + 1)
    for each in (run, again, later):
        each.step(batch)
    assert _bytes(run.trainable()) == _bytes(again.trainable())
    assert _bytes(run.trainable()) != _bytes(later.trainable())


@pytest.mark.slow
def test_the_share_of_lost_updates_counts_what_trains() -> None:
    run = tiny_steps.start(
        model={"param_dtype": "bfloat16"},
        optimizer={"learning_rate": 1e-3, "weight_decay": 0.5},
        training={"freeze": ["model.layers.0", "lm_head"]},
    )
    before = run.trainable()
    told = run.step(tiny_steps.batch()).updates_lost
    updated = {p: np.asarray(m) != 0 for p, m in run.state.opt_state[0].mu.items()}
    same = sum(
        int((a[updated[p]] == before[p][updated[p]]).sum()) for p, a in run.trainable().items()
    )
    assert float(told) == pytest.approx(
        same / sum(int(u.sum()) for u in updated.values()), abs=0.02
    )
