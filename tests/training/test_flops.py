# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a token: against the traced step, against XLA's count, against figures by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
import tiny_steps
from jaxpr_flops import step_flops

from dsjax import adapters
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.prefix import PrefixConfig
from dsjax.models import Model, build, moe, predict_ahead
from dsjax.training.flops import TokenFlops, token_flops
from dsjax.training.partition import make_partition

POLICIES = ("none", "dots", "names", "full")
OTHERS = ("none", "dots", "full")
TAKE_LONG = ("v3_lora_on_latents", "v3_lora_in_one_layer", "v3_ahead", "v32")
ALL = LoraConfig(r=4, lora_alpha=8)
QV = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
QKV_LATENTS = LoraConfig(r=4, lora_alpha=8, target_modules=["q_a_proj", "kv_a_proj_with_mqa"])
ONE_LAYER = LoraConfig(r=4, lora_alpha=8, layers_to_transform=[2])
NO_GROUPS = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None}
V2 = tiny_steps.V3 | NO_GROUPS | {"model_type": "deepseek_v2"}
V32 = tiny_steps.V3 | {
    "model_type": "deepseek_v32",
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
}


class Case(NamedTuple):
    """What is trained how."""

    shape: Mapping[str, Any]
    adapter: LoraConfig | PrefixConfig | None = None
    freeze: tuple[str, ...] = ()
    mtp: bool = False


CASES = {
    "llama": Case({}),
    "llama_lora": Case({}, ALL),
    "llama_lora_on_q_and_v": Case({}, QV),
    "llama_prefix": Case({}, PrefixConfig(8)),
    "llama_upper_half": Case({"num_hidden_layers": 4}, None, ("embed_tokens", r"layers\.[01]")),
    "llama_head_only": Case({}, None, ("model",)),
    "qwen3_tied": Case({"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True}),
    "v2_lora": Case(V2, ALL),
    "v3": Case(tiny_steps.V3),
    "v3_lora_on_latents": Case(tiny_steps.V3, QKV_LATENTS),
    "v3_lora_on_experts": Case(tiny_steps.V3, tiny_steps.UNEVEN_EXPERTS),
    "v3_lora_in_one_layer": Case(tiny_steps.V3, ONE_LAYER),
    "v3_ahead": Case(tiny_steps.V3 | {"num_nextn_predict_layers": 1}, mtp=True),
    "v32": Case(V32),
    "v32_lora": Case(V32, ALL),
}


def start(case: Case, remat: str) -> tiny_steps.Run:
    training = {"freeze": list(case.freeze), "gradient_checkpointing": remat}
    objective = {"mtp_loss_weight": 0.3 * case.mtp}
    shape = {"max_position_embeddings": 4096, **case.shape}
    return tiny_steps.start(shape, case.adapter, training=training, objective=objective)


def model_of(case: Case) -> Model:
    model = build(tiny_steps.SHAPE | case.shape, "float32")
    if case.mtp:
        predict_ahead(model)
    adapters.attach(model, case.adapter)
    return model


def flops(case: Case, length: int, remat: str = "none", chunks: bool = False) -> TokenFlops:
    model = model_of(case)
    return token_flops(model, make_partition(model, freeze=case.freeze), length, remat, chunks)


def assert_executed(case: Case, length: int, remat: str, chunks: bool = False) -> None:
    rows = 2
    found = step_flops(start(case, remat), tiny_steps.batch(rows, length)) / (rows * length)
    # The plain path multiplies the whole square of which half is causal: rows of twice the length.
    assert flops(case, 2 * length, remat, chunks).executed == pytest.approx(found, 1e-12)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in TAKE_LONG))
        for name, case in CASES.items()
    ],
)
def test_executed_flops_are_those_of_the_traced_step(case):
    assert_executed(case, 24, "names")


@pytest.mark.slow
@pytest.mark.parametrize("remat", OTHERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_executed_flops_are_those_of_the_traced_step_under_every_policy(case, remat):
    assert_executed(case, 24, remat)


@pytest.mark.parametrize(
    "remat",
    ["names", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "dots", "full"))],
)
@pytest.mark.parametrize("name", ["llama", "llama_lora_on_q_and_v"])
def test_long_rows_compute_their_scores_again(name, remat):
    assert_executed(CASES[name], 2048, remat)


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        pytest.param("v3_lora_on_experts", "none", marks=pytest.mark.slow),
        ("v2_lora", "names"),
        pytest.param("v3", "none", marks=pytest.mark.slow),
        pytest.param("v3", "full", marks=pytest.mark.slow),
    ],
)
def test_chunks_of_tokens_go_through_their_experts_again(name, remat, monkeypatch):
    row_bytes = 2 * 3 * 32 * 4  # rows, experts of a token, width, bytes
    monkeypatch.setattr(moe, "CHUNK_BYTES", 6 * row_bytes)
    assert moe.tokens_at_once(2, 3, 32, 4) == 6
    assert_executed(CASES[name], 24, remat, chunks=True)
    plain, chunked = (flops(CASES[name], 24, remat, chunks) for chunks in (False, True))
    assert plain.needed == chunked.needed
    assert (plain.executed < chunked.executed) == (remat == "none")


WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "moe_intermediate_size": 128,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
LLAMA1 = WIDE | {"num_hidden_layers": 1}
QWEN1 = LLAMA1 | {"model_type": "qwen3", "head_dim": 48}
V2_2 = V2 | WIDE | {"num_hidden_layers": 2, "q_lora_rank": None}
V3_2 = tiny_steps.V3 | WIDE | {"num_hidden_layers": 2}


# The lowest layer that trains counts whole, but nothing asks for the gradient of its input: of q, k
# and v, or of the latents, and of their adapters' A. XLA leaves these out where a stack has one
# layer. FLOPs of a token.
BELOW = {
    "llama_lora": (Case(LLAMA1, ALL), 2 * 256 * (256 + 128 + 128 + 3 * 4)),
    "llama": (Case(LLAMA1), 0),
    "qwen3": (Case(QWEN1), 0),
    "qwen3_lora": (Case(QWEN1, ALL), 2 * 256 * (192 + 96 + 96 + 3 * 4)),
    "v2": (Case(V2_2), 0),
    "v2_lora": (Case(V2_2, ALL), 2 * 256 * (192 + 80 + 2 * 4)),
    "v3": (Case(V3_2), 0),
    "v3_lora": (Case(V3_2, ALL), 2 * 256 * (96 + 80 + 2 * 4)),
    "v3_upper_layer": (Case(V3_2, None, ("embed_tokens", r"layers\.0")), 2 * 256 * (96 + 80)),
}
SLOW = {name: [pytest.mark.slow] for name in BELOW if name != "llama_lora"}


@pytest.mark.parametrize(
    ("case", "below"),
    [pytest.param(*both, id=name, marks=SLOW.get(name, [])) for name, both in BELOW.items()],
)
def test_needed_flops_are_what_xla_counts(case, below, monkeypatch):
    # XLA counts a loop's body once: here no stack has more than one layer, and the loop over the
    # experts' tiles becomes one product of the same size.
    monkeypatch.setattr(
        moe, "grouped_matmul", lambda x, weight, sizes: jnp.einsum("zi,oi->zo", x, weight[0])
    )
    # Whether XLA sees that the head's recomputation is its forward product depends on its version.
    monkeypatch.setattr("jax.checkpoint", lambda function: function)
    rows, length = 16, 64
    batch = tiny_steps.batch(rows, length)
    compiled: Any = start(case, "none").compile(batch).compiled
    found = compiled.cost_analysis()["flops"] / (rows * length)
    needed = flops(case, 2 * length).needed - below
    # XLA also counts norms, rope, softmax and AdamW.
    assert 1.0 < found / needed < 1.035


def test_full_training_of_a_llama_by_hand():
    # 2 layers: q 32 x 32, k and v 16 x 32, o 32 x 32, three of 64 x 32; the head 64 x 32.
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 64 * 32
    attention = 2 * 2 * 4 * (8 + 8) * 10  # layers, two FLOPs, heads, sizes, half of 20 keys
    found = flops(CASES["llama"], 20)
    assert found.needed == 6 * weights + 3 * attention
    assert found.executed == found.needed + 2 * 64 * 32


def test_lora_needs_no_gradients_of_frozen_weights():
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 64 * 32
    adapter = 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96)
    attention = 2 * 2 * 4 * (8 + 8) * 10
    assert flops(CASES["llama_lora"], 20).needed == 4 * weights + 6 * adapter + 3 * attention


def test_nothing_is_needed_below_the_lowest_layer_that_trains():
    whole, half = flops(Case({"num_hidden_layers": 4}), 20), flops(CASES["llama_upper_half"], 20)
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
    attention = 2 * 4 * (8 + 8) * 10
    assert whole.needed - half.needed == 2 * (4 * layer + 2 * attention)
    assert whole.executed == half.executed  # but a scan treats its layers alike
    # With the head alone nothing runs backward but its own weight's gradient.
    alone = flops(CASES["llama_head_only"], 20).needed
    assert alone == 2 * (2 * layer + attention) + 4 * 64 * 32


def test_a_token_meets_the_experts_it_is_sent_to():
    more = flops(Case(tiny_steps.V3 | {"n_routed_experts": 16}), 24).needed
    routers = 2 * 8 * 32
    assert more - flops(CASES["v3"], 24).needed == 6 * routers


def test_a_query_sees_half_a_row_its_window_or_what_the_indexer_chose():
    def windowed(window: int) -> float:
        keys = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
        return flops(Case({"model_type": "qwen2", **keys}), 20).needed

    per_key = 3 * 2 * 2 * 4 * 16
    # Of 20 queries with a window of 4, the first three see fewer.
    fewer = per_key * (10 - (4 - 4**2 / 40))
    assert windowed(20) - windowed(4) == pytest.approx(fewer, 1e-12)
    assert flops(CASES["v32"], 8).needed == flops(Case(V32 | {"index_topk": 9}), 8).needed
    sparse, dense = flops(CASES["v32"], 24), flops(Case(V32 | {"index_topk": 24}), 24)
    assert sparse.needed < dense.needed and sparse.executed > dense.executed


def test_the_example_of_the_document():
    config = Path(__file__).parents[1] / "model_configs/deepseek_v2_lite/config.json"
    model = build(json.loads(config.read_text()), "bfloat16")
    adapters.attach(model, LoraConfig(r=16, lora_alpha=32))
    partition = make_partition(model, dtype="bfloat16")
    found = {remat: token_flops(model, partition, 2048, remat) for remat in POLICIES}
    text = (Path(__file__).parents[2] / "docs" / "throughput.md").read_text("utf-8")
    assert f"| needed | {found['none'].needed:,.0f} |" in text
    executed = [f"{found[remat].executed / 1e9:.1f}" for remat in POLICIES]
    first, second, third, last = executed
    assert f"{first} GFLOPs with `none`, {second} with `dots`, {third} with `names`" in text
    assert f"{last} with `full`" in text
