# SPDX-License-Identifier: Apache-2.0
"""Every routed expert has factors of its own; which it is, names on disk say."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from flax import nnx

from dsjax import adapters
from dsjax.adapters import lora
from dsjax.adapters.expert_lora import ExpertLora
from dsjax.adapters.lora import LoraConfig
from dsjax.errors import ConfigError
from dsjax.models.moe import ExpertLinear
from dsjax.training.partition import make_partition

INDEXER = {
    "model_type": "deepseek_v32",
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 5,
}
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = "model.layers.mlp.experts"


def _attached(spec: LoraConfig, **shape: Any) -> nnx.Module:
    model = tiny_steps.model_of(**(tiny_steps.V3 | shape))
    adapters.attach(model, spec)
    return model


def _adapted(spec: LoraConfig, **shape: Any) -> set[str]:
    """The adapted modules' names, without `model.layers`."""
    modules = lora.targets(tiny_steps.model_of(**(tiny_steps.V3 | shape)), spec).values()
    names = {name for layers in modules for name, hit in layers.items() if hit}
    return {name.removeprefix("model.layers.") for name in names}


def _spec(targets: str | list[str], **fields: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": targets} | fields))


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32"])
def test_all_linear_leaves_out_experts_router_and_indexer(kind: str) -> None:
    shape = INDEXER if kind == "deepseek_v32" else {}
    attention = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    expected = {f"{layer}.self_attn.{name}" for layer in range(3) for name in attention}
    expected |= {f"0.mlp.{name}" for name in FEED_FORWARD}
    expected |= {f"{i}.mlp.shared_experts.{name}" for i in (1, 2) for name in FEED_FORWARD}
    assert _adapted(_spec("all-linear"), **shape) == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            _spec(["up_proj"], layers_to_transform=[0, 2]),
            {"0.mlp.up_proj", "2.mlp.shared_experts.up_proj"}
            | {f"2.mlp.experts.{i}.up_proj" for i in range(8)},
        ),
        (_spec(["experts.7.down_proj"]), {f"{i}.mlp.experts.7.down_proj" for i in (1, 2)}),
        (
            _spec(r".*layers\.2\.mlp\.experts\.[35]\.(gate|up)_proj"),
            {f"2.mlp.experts.{i}.{name}_proj" for i in (3, 5) for name in ("gate", "up")},
        ),
        (_spec(["mlp.down_proj"]), {"0.mlp.down_proj"}),
    ],
)
def test_experts_are_named_as_on_disk(spec: LoraConfig, expected: set[str]) -> None:
    assert _adapted(spec) == expected


def test_only_what_trains_is_counted() -> None:
    counts = {
        path: leaf.count
        for path, leaf in make_partition(_attached(tiny_steps.UNEVEN_EXPERTS)).leaves.items()
    }

    ranks = 2 * 3 + 2 * 2  # of gates: two experts of layer 1, two of layer 2
    assert counts[f"{EXPERTS}.gate_proj.adapter.lora_A"] == ranks * 32
    assert counts[f"{EXPERTS}.gate_proj.adapter.lora_B"] == ranks * 16
    assert counts[f"{EXPERTS}.down_proj.adapter.lora_A"] == 2 * 8 * 2 * 16
    assert f"{EXPERTS}.up_proj.adapter.lora_A" not in counts
    partition = make_partition(_attached(tiny_steps.UNEVEN_EXPERTS))
    dense = 2 * (64 + 32) + 2 * 2 * (16 + 32) + 3 * 2 * (24 + 32)  # down, shared down, o
    experts = ranks * (32 + 16) + 2 * 8 * 2 * (16 + 32)
    assert partition.counts()[0] == dense + experts


@pytest.mark.slow
def test_experts_without_an_adapter_stay_zero() -> None:
    run = tiny_steps.start(
        tiny_steps.V3, tiny_steps.UNEVEN_EXPERTS, optimizer={"weight_decay": 0.5}
    )
    for seed in range(4):
        run.step(tiny_steps.batch(seed=seed))
    trained = run.trainable()
    a, b = (trained[f"{EXPERTS}.gate_proj.adapter.lora_{part}"] for part in "AB")
    own = np.zeros((2, 8), int)
    own[0, [2, 5]], own[1, [2, 5]] = 3, 2
    assert a.shape == (2, 8, 3, 32) and b.shape == (2, 8, 16, 3)
    for layer, expert in np.ndindex(2, 8):
        rank = own[layer, expert]
        assert a[layer, expert, :rank].all() and b[layer, expert, :, :rank].all()
        assert not a[layer, expert, rank:].any() and not b[layer, expert, :, rank:].any()
    scaling = np.asarray(run.frozen[f"{EXPERTS}.gate_proj.adapter.scaling"])
    np.testing.assert_allclose(scaling[:, 5], [7 / 3, 7 / 2])
    np.testing.assert_allclose(scaling[:, 2], [4 / 3, 4 / 2])
    assert not scaling[:, [0, 1, 3, 4, 6, 7]].any()


def test_the_start_is_drawn_for_each_expert() -> None:
    model = _attached(_spec(["experts.1.up_proj", "experts.2.up_proj"], r=16))
    path = f"{EXPERTS}.up_proj.adapter.lora_A"
    leaf = make_partition(model).leaves[path]
    values = np.asarray(lora.initial(path, leaf, model, tiny_steps.jax.random.key(0), {}))
    assert not values[:, [0, 3, 4, 5, 6, 7]].any()
    drawn = values[:, 1:3]
    assert len(np.unique(drawn)) > 0.99 * drawn.size
    assert 0.95 / 32**0.5 < abs(drawn).max() <= 1 / 32**0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_group_gets_its_own_update(dtype: str) -> None:
    rng = np.random.default_rng(0)
    sizes, ranks = np.int32([3, 0, 4, 2]), [2, 2, 0, 1]
    a_ErI, b_EOr = rng.normal(size=(4, 2, 6)), rng.normal(size=(4, 5, 2))
    scaling = np.float32([0.5, 2.0, 0.0, 3.0])
    linear = ExpertLinear(6, 5, ("mlp", "embed"), experts=4, layers=1)
    module = ExpertLora(linear, ranks, scaling.tolist())
    values = {"lora_A": a_ErI, "lora_B": b_EOr, "scaling": scaling}
    state = nnx.from_flat_state({(k,): jnp.asarray(v, "float32") for k, v in values.items()})
    x, y = rng.normal(size=(9, 6)), rng.normal(size=(9, 5))

    merged = nnx.merge(nnx.graphdef(module), state)
    out = merged(jnp.asarray(x, dtype), lambda _: jnp.asarray(y, dtype), jnp.asarray(sizes))

    def held(array: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(array, dtype), np.float32)

    group = np.repeat(np.arange(4), sizes)
    low = held(np.einsum("zi,zri->zr", held(x), held(a_ErI)[group]))
    low = held(low * scaling[group][:, None])
    update = held(np.einsum("zr,zor->zo", low, held(b_EOr)[group]))
    assert out.dtype == dtype
    # Half a unit of bfloat16: of the sum, all before it being rounded here as there.
    bound = {"rtol": 1e-6, "atol": 1e-5} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-5}
    np.testing.assert_allclose(np.asarray(out, np.float32), held(y) + update, **bound)


def test_factors_are_held_in_parts() -> None:
    run = tiny_steps.start(tiny_steps.V3, _spec(FEED_FORWARD), mesh={"expert": 4, "tensor": 2})
    parts = {
        path.removeprefix(f"{EXPERTS}."): {s.data.shape for s in array.addressable_shards}
        for path, array in run.state.trainable.items()
        if path.startswith(EXPERTS)
    }
    assert parts["gate_proj.adapter.lora_A"] == {(2, 2, 2, 32)}
    assert parts["gate_proj.adapter.lora_B"] == {(2, 2, 8, 2)}
    assert parts["down_proj.adapter.lora_A"] == {(2, 2, 2, 8)}
    assert parts["down_proj.adapter.lora_B"] == {(2, 2, 32, 2)}


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        (
            {"target_modules": ["o_proj", "down_proj"], "lora_dropout": 0.1},
            {},
            r"adapter.lora_dropout: got 0.1, expected 0 with routed experts in "
            r"adapter.target_modules \(model.layers.1.mlp.experts.0.down_proj\)",
        ),
        (
            {"target_modules": ["o_proj", "gate"]},
            {},
            r"adapter.target_modules: got 'gate', .* it is the experts' router, which has no",
        ),
        (
            {"target_modules": ["mlp.gate"]},
            {},
            r"adapter.target_modules: got 'mlp.gate', .* it is the experts' router",
        ),
        (
            {"target_modules": ["indexer.wk"]},
            INDEXER,
            r"got 'indexer.wk', .* no gradient reaches the indexer",
        ),
        (
            {"target_modules": ["experts.8.up_proj"]},
            {},
            r"got 'experts.8.up_proj', which matches no linear module",
        ),
        (
            {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
            {},
            r"adapter.target_parameters: got 'mlp.gate.weight', which matches no weight of",
        ),
        (
            {"target_modules": [], "target_parameters": ["experts.gate_up_proj"], "r": 3},
            {},
            r"adapter.rank_pattern: got rank 3 for model.layers.1.mlp.experts.gate_up_proj, exp",
        ),
    ],
)
def test_what_has_no_adapter_is_refused(
    fields: dict[str, Any], shape: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _attached(LoraConfig(**({"r": 2, "lora_alpha": 4} | fields)), **shape)


def test_dropout_without_routed_experts_is_taken() -> None:
    spec = _spec(["o_proj", "shared_experts.down_proj"], lora_dropout=0.1)
    assert any("shared_experts" in path for path in make_partition(_attached(spec)).trainable)
