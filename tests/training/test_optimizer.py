# SPDX-License-Identifier: Apache-2.0
"""Schedules against transformers, AdamW and clipping against torch, Lion against the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_parameter_names

from dsjax.config import OptimizerSection
from dsjax.errors import ConfigError
from dsjax.training.optimizer import (
    DECAYS,
    check_rates,
    clip_by_global_norm,
    decay_mask,
    few_steps,
    make_optimizer,
    make_schedule,
    unused_keys,
    warmup_length,
)


def hugging_face_rates(name, base, warmup, total, steps, **kwargs):
    """Evaluate the lambda of `transformers.get_scheduler` at each step, in double precision."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = transformers.get_scheduler(
        name, optimizer, warmup, total, scheduler_specific_kwargs=kwargs or None
    )
    return np.array([base * scheduler.lr_lambdas[0](int(step)) for step in steps])


def our_rates(section, total, steps):
    return np.asarray(jax.jit(jax.vmap(make_schedule(section, total)))(jnp.asarray(steps)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"lr_scheduler_type": "cosine"}, ("cosine", {})),
        (
            {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1},
            ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ),
        ({"lr_scheduler_type": "cosine_with_restarts"}, ("cosine_with_restarts", {})),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "num_cycles": 3},
            ("cosine_with_restarts", {"num_cycles": 3}),
        ),
        ({"lr_scheduler_type": "linear"}, ("linear", {})),
        ({"lr_scheduler_type": "constant"}, ("constant", {})),
        ({"lr_scheduler_type": "constant_with_warmup"}, ("constant_with_warmup", {})),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_ratio": 0.25},
            ("cosine_with_min_lr", {"min_lr_rate": 0.25}),
        ),
    ],
    ids=[
        *("cosine", "cosine-min", "restarts-1", "restarts-3", "linear"),
        *("constant", "constant-warm-up", "cosine-named-min"),
    ],
)
@pytest.mark.parametrize(
    ("warmup", "total"), [(0, 1), (0, 37), (7, 100), (10, 10), (50, 20), (3_000, 100_000)]
)
def test_schedule_equals_hugging_face_at_every_step(ours, theirs, warmup, total):
    section = OptimizerSection(learning_rate=2e-4, warmup_steps=warmup, **ours)
    steps = np.arange(total + 5)
    expected = hugging_face_rates(theirs[0], 2e-4, warmup, total, steps, **theirs[1])
    # Where the double itself is rounding noise (below 1e-12 of the peak) only that bound counts.
    np.testing.assert_allclose(our_rates(section, total, steps), expected, rtol=1e-6, atol=2e-16)


@pytest.mark.parametrize("name", ["linear", "cosine_with_restarts"])
def test_minimum_lifts_every_decay_and_spares_the_warm_up(name):
    plain = OptimizerSection(learning_rate=1.0, lr_scheduler_type=name, warmup_steps=4)
    lifted = plain.model_copy(update={"min_lr_ratio": 0.25})
    steps = np.arange(20)
    bare, rates = our_rates(plain, 20, steps), our_rates(lifted, 20, steps)
    np.testing.assert_array_equal(rates[:4], bare[:4])
    np.testing.assert_allclose(rates[4:], 0.25 + 0.75 * bare[4:], rtol=1e-6)


def test_warm_up_steps_win_over_the_ratio():
    section = OptimizerSection(warmup_ratio=0.03, warmup_steps=None)
    assert [warmup_length(section, total) for total in (2, 100, 101)] == [1, 3, 4]
    assert warmup_length(section.model_copy(update={"warmup_steps": 0}), 100) == 0
    assert float(make_schedule(section, 100)(0)) == 0.0


@settings(max_examples=30)
@given(
    st.integers(1, 400),
    st.floats(0, 1),
    st.sampled_from(sorted(DECAYS)),
    st.floats(1e-12, 1),
)
def test_a_run_always_has_a_step_at_its_peak(total, ratio, kind, rate):
    """Whatever the ratio says of however few steps: 91 rows made one, of rate 0."""
    section = OptimizerSection(learning_rate=rate, warmup_ratio=ratio, lr_scheduler_type=kind)
    check_rates(section, total)
    warmup = warmup_length(section, total)
    assert warmup < total
    assert float(make_schedule(section, total)(warmup)) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(("steps", "total"), [(1, 1), (2, 2), (10, 3)])
def test_a_warm_up_of_the_whole_run_is_refused(steps, total):
    section = OptimizerSection(warmup_steps=steps)
    message = rf"^optimizer.warmup_steps: got {steps} in a run of {total} steps, expected fewer"
    with pytest.raises(ConfigError, match=message):
        check_rates(section, total)
    check_rates(section, steps + 1)


@pytest.mark.parametrize("rate", [0.0, 1e-50])
def test_a_learning_rate_of_nothing_is_refused(rate):
    section = OptimizerSection(learning_rate=rate)
    with pytest.raises(ConfigError, match=r"^optimizer.learning_rate: got .* would change a"):
        check_rates(section, 100)
    check_rates(section, 100, moves_biases=True)


def test_few_steps_are_told():
    told = few_steps(1, 6, 16, 6)
    assert told == [
        "only 1 step: 6 rows, 16 in each step; for more, raise training.num_train_epochs or "
        "training.max_steps, or lower training.batch_size"
    ]
    assert few_steps(10, 160, 16, 400) == []
    packed = few_steps(2, 20, 16, 300)[0]
    assert packed.endswith("training.batch_size, or data.packing=false (300 rows)")


def test_keys_that_nothing_reads_are_named():
    section = OptimizerSection(
        optim="lion",
        lr_scheduler_type="constant_with_warmup",
        num_cycles=2,
        min_lr_ratio=0.1,
        warmup_ratio=0.1,
        warmup_steps=3,
        adam_epsilon=1e-6,
    )
    assert unused_keys(section) == [
        "optimizer.num_cycles",
        "optimizer.min_lr_ratio",
        "optimizer.warmup_ratio",
        "optimizer.adam_epsilon",
    ]
    used = OptimizerSection(
        lr_scheduler_type="cosine_with_restarts", num_cycles=2, min_lr_ratio=0.1, warmup_ratio=0.1
    )
    assert unused_keys(used) == []


def test_decay_mask_is_the_trainers():
    excluded = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    config = transformers.Qwen3Config(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, vocab_size=16, attention_bias=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    decaying = set(get_parameter_names(model, [torch.nn.LayerNorm], excluded))
    mask = decay_mask(dict(model.named_parameters()))
    assert mask == {name: name in decaying for name, _ in model.named_parameters()}
    assert not mask["model.norm.weight"] and not mask["model.layers.0.self_attn.q_norm.weight"]


def test_adapters_decay():
    paths = [
        "model.layers.self_attn.q_proj.adapter.lora_A",
        "model.layers.self_attn.q_proj.adapter.lora_B",
        "model.layers.self_attn.prefix.key",
    ]
    assert decay_mask(dict.fromkeys(paths)) == dict.fromkeys(paths, True)


PATHS = {"dense.weight": (5, 7), "dense.bias": (5,), "model.norm.weight": (7,)}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in PATHS.items()}


def run_ours(section, total, grads):
    schedule = make_schedule(section, total)
    optimizer = make_optimizer(section, schedule, decay_mask(PATHS))
    params = jax.tree.map(jnp.asarray, random_tree(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grad):
        grad = clip_by_global_norm(grad, optax.tree.norm(grad), section.max_grad_norm)
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for grad in grads:
        params, state = step(params, state, grad)
        history.append(params)
    return history, state


def run_torch(section, total, grads):
    params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in random_tree(0).items()}
    mask = decay_mask(PATHS)
    groups = [
        {"params": [p for k, p in params.items() if mask[k] is decays], "weight_decay": decay}
        for decays, decay in ((True, section.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
    )
    scheduler = transformers.get_scheduler("cosine", optimizer, section.warmup_steps, total)
    history = []
    for grad in grads:
        for key, value in grad.items():
            params[key].grad = torch.tensor(value)
        if section.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(params.values(), section.max_grad_norm)
        optimizer.step()
        scheduler.step()
        history.append({k: p.detach().numpy().copy() for k, p in params.items()})
    return history


@pytest.mark.parametrize("max_grad_norm", [None, 0.0, 1.0])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
def test_adamw_equals_torch_step_for_step(max_grad_norm, epsilon):
    section = OptimizerSection(
        learning_rate=1e-2, weight_decay=5.0, warmup_steps=5, adam_epsilon=epsilon,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    # Norms from far below to far above the limit, so that only some steps are clipped.
    grads = [random_tree(1 + i, scale=10.0 ** (i % 4 - 2)) for i in range(20)]
    ours, _ = run_ours(section, 20, grads)
    for step, (mine, theirs) in enumerate(zip(ours, run_torch(section, 20, grads), strict=True)):
        for key in PATHS:
            np.testing.assert_allclose(
                mine[key], theirs[key], rtol=1e-6, atol=1e-6, err_msg=f"{key} at step {step}"
            )


def test_lion_follows_the_paper():
    section = OptimizerSection(
        optim="lion", learning_rate=1e-2, weight_decay=2.0, adam_beta2=0.99, warmup_steps=2,
        max_grad_norm=None,
    )  # fmt: skip
    grads = [random_tree(1 + i) for i in range(6)]
    ours, _ = run_ours(section, 6, grads)
    params, momentum = random_tree(0), jax.tree.map(np.zeros_like, random_tree(0))
    rates = our_rates(section, 6, np.arange(6))
    for grad, rate, mine in zip(grads, rates, ours, strict=True):
        for key, decays in decay_mask(PATHS).items():
            direction = np.sign(0.9 * momentum[key] + 0.1 * grad[key])
            params[key] -= rate * (direction + 2.0 * decays * params[key])
            momentum[key] = 0.99 * momentum[key] + 0.01 * grad[key]
            np.testing.assert_allclose(mine[key], params[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw", "lion"])
def test_state_is_moments_keyed_like_the_parameters_and_counters(optim):
    section = OptimizerSection(optim=optim)
    optimizer = make_optimizer(section, make_schedule(section, 10), decay_mask(PATHS))
    state = jax.eval_shape(optimizer.init, random_tree(0))
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        key = path[-1]
        shapes.setdefault(getattr(key, "key", None), set()).add((leaf.shape, leaf.dtype.name))
    counters = shapes.pop(None)
    assert counters == {((), "int32")}
    assert shapes == {key: {(shape, "float32")} for key, shape in PATHS.items()}


def test_clipping_keeps_small_gradients_and_dtypes():
    grads = {"a": jnp.full(4, 3.0, jnp.bfloat16), "b": jnp.full(4, 4.0)}
    norm = jnp.float32(10.0)
    clipped = clip_by_global_norm(grads, norm, 1.0)
    np.testing.assert_allclose(clipped["b"], 0.4, rtol=1e-6)
    assert clipped["a"].dtype == jnp.bfloat16
    untouched = clip_by_global_norm(grads, norm, 20.0)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), grads, untouched))
    assert clip_by_global_norm(grads, norm, None) is grads
