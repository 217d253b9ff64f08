# SPDX-License-Identifier: Apache-2.0
"""What trains is decided once, covers every leaf, and a pattern that matches nothing is refused."""

from typing import Any

import jax
import numpy as np
import pytest
import tiny_steps

from dsjax.adapters import attach
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.prefix import PrefixConfig
from dsjax.errors import ConfigError
from dsjax.models import base_shapes
from dsjax.training.partition import Partition, flatten, make_partition, report, unflatten

STACKED = 9  # parameters of a block without biases: two norms, four and three projections


def _decide(freeze: list[str] | None = None, adapter: Any = None, **shape: Any) -> Partition:
    model = tiny_steps.model_of(**{"num_hidden_layers": 3} | shape)
    attach(model, adapter)
    return make_partition(model, freeze=freeze or [], dtype="bfloat16")


def test_without_adapter_everything_trains() -> None:
    partition = _decide()
    assert len(partition.leaves) == STACKED + 3
    assert set(partition.trainable) == set(partition.leaves) and partition.frozen == ()
    assert partition.layer_masks == {}
    assert partition.counts() == (partition.counts()[1],) * 2


@pytest.mark.parametrize(
    "adapter", [LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]), PrefixConfig(4)]
)
def test_an_adapter_trains_alone(adapter: LoraConfig | PrefixConfig) -> None:
    partition = _decide(adapter=adapter)
    kinds = {path: leaf.kind for path, leaf in partition.leaves.items()}
    assert {kinds[path] for path in partition.trainable} == {"adapter"}
    assert {kinds[path] for path in partition.frozen} <= {"base", "buffer"}
    assert set(partition.trainable) | set(partition.frozen) == set(kinds)
    assert len(partition.trainable) == 2
    assert {leaf.dtype.name for leaf in partition.leaves.values() if leaf.kind == "base"} == {
        "bfloat16"
    }
    expected = 3 * 2 * (32 + 32) if isinstance(adapter, LoraConfig) else 3 * 2 * 4 * 2 * 8
    assert partition.counts()[0] == expected


@pytest.mark.parametrize(
    ("freeze", "frozen", "masks"),
    [
        (["lm_head"], {"lm_head.weight"}, {}),
        (["model.embed_tokens.weight"], {"model.embed_tokens.weight"}, {}),
        (["embed_tokens", r"model\.norm"], {"model.embed_tokens.weight", "model.norm.weight"}, {}),
        (
            [r"\w*layernorm"],
            {f"model.layers.{n}_layernorm.weight" for n in ("input", "post_attention")},
            {},
        ),
        ([r"layers\.\d+\.mlp\.up_proj"], {"model.layers.mlp.up_proj.weight"}, {}),
        (["layers.1.mlp.up_proj"], set(), {"model.layers.mlp.up_proj.weight": [True, False, True]}),
        (
            ["layers.[02].self_attn.[qk]_proj"],
            set(),
            {
                "model.layers.self_attn.q_proj.weight": [False, True, False],
                "model.layers.self_attn.k_proj.weight": [False, True, False],
            },
        ),
    ],
)
def test_a_pattern_freezes_the_tensors_that_it_names(
    freeze: list[str], frozen: set[str], masks: dict[str, list[bool]]
) -> None:
    partition = _decide(freeze)
    assert set(partition.frozen) == frozen
    assert set(partition.trainable) == set(partition.leaves) - frozen
    assert {path: mask.tolist() for path, mask in partition.layer_masks.items()} == masks


def test_a_layer_number_is_whole() -> None:
    partition = _decide(["model.layers.1"], num_hidden_layers=12)
    assert len(partition.layer_masks) == STACKED
    for mask in partition.layer_masks.values():
        assert mask.tolist() == [layer != 1 for layer in range(12)]


def test_the_arrays_of_an_adapter_are_one_row_of_the_table() -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    rows = {row[0]: row[1:] for row in report(_decide(adapter=lora))}
    assert rows == {
        "model.layers.mlp.down_proj": (
            "lora_A 3 x 4 x 64, lora_B 3 x 32 x 4",
            "float32",
            1152,
            1152,
        ),
        "model.layers.self_attn.q_proj": (
            "lora_A 3 x 4 x 32, lora_B 3 x 32 x 4",
            "float32",
            768,
            768,
        ),
    }


def test_counts_leave_frozen_layers_out() -> None:
    whole, some = _decide(), _decide(["model.layers.0", "lm_head"])
    shapes = base_shapes(tiny_steps.model_of(num_hidden_layers=3))
    layers = sum(np.prod(shape) for path, shape in shapes.items() if ".layers." in path)
    assert some.counts() == (whole.counts()[0] - layers // 3 - 64 * 32, whole.counts()[1])
    rows = {row[0]: row[1:] for row in report(some)}
    assert set(rows) == set(some.trainable)
    assert rows["model.layers.mlp.up_proj.weight"] == (
        "3 x 64 x 32",
        "float32",
        2 * 64 * 32,
        3 * 64 * 32,
    )


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            ["lm_haed"],
            r"training.freeze: got 'lm_haed', which matches no tensor; did you mean lm_head",
        ),
        (["layers.7"], "training.freeze: got 'layers.7', which matches no tensor"),
        (["proj"], "training.freeze: got 'proj', which matches no tensor"),
        (["*norm"], r"training.freeze: got '\*norm', expected a regular expression .*write \.\*"),
        (
            [".*"],
            r"training.freeze: got \['\.\*'\], which freezes every tensor, expected at least one",
        ),
        (["model", "lm_head"], "which freezes every tensor"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(freeze: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _decide(freeze)


def test_every_wrong_pattern_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        _decide(["lm_haed", "(", "lm_head", "layers.9"])
    assert [line.split(",")[0] for line in str(error.value).splitlines()] == [
        "training.freeze: got '('",
        "training.freeze: got 'lm_haed'",
        "training.freeze: got 'layers.9'",
    ]


def test_patterns_beside_an_adapter_are_refused() -> None:
    message = r"training.freeze: got \['lm_head'\] with an adapter, expected \[\]"
    with pytest.raises(ConfigError, match=message):
        _decide(["lm_head"], PrefixConfig(2))


@pytest.mark.parametrize(
    ("param_dtype", "trained"), [(None, "float32"), ("float32", "float32"), ("bfloat16",) * 2]
)
def test_dtypes_follow_what_trains(param_dtype: str | None, trained: str) -> None:
    model = tiny_steps.model_of()
    partition = make_partition(model, freeze=["lm_head"], dtype="float16", param_dtype=param_dtype)
    dtypes = {path: leaf.dtype.name for path, leaf in partition.leaves.items()}
    assert dtypes.pop("lm_head.weight") == "float16"
    assert set(dtypes.values()) == {trained}


def test_a_model_that_is_only_used_trains_nothing() -> None:
    attached = _decide(adapter=LoraConfig(r=2, lora_alpha=2)).for_inference("float16")
    assert attached.trainable == () and set(attached.frozen) == set(attached.leaves)
    assert {(leaf.kind, leaf.dtype.name) for leaf in attached.leaves.values()} == {
        ("base", "float16"),
        ("adapter", "float32"),
        ("buffer", "float32"),
    }


def test_a_routers_bias_is_float32_whatever_the_model_is_held_in() -> None:
    leaves = make_partition(tiny_steps.model_of(**tiny_steps.V3)).for_inference("bfloat16").leaves
    dtypes = {path.rpartition(".")[2]: leaf.dtype.name for path, leaf in leaves.items()}
    assert dtypes == {"e_score_correction_bias": "float32", "weight": "bfloat16"}


def test_arrays_go_in_and_come_out() -> None:
    partition = _decide(adapter=PrefixConfig(2))
    params = {
        path: jax.numpy.full(leaf.shape, number, leaf.dtype)
        for number, (path, leaf) in enumerate(partition.leaves.items())
    }
    trainable = {path: params[path] for path in partition.trainable}
    frozen = {path: params[path] for path in partition.frozen}
    model = partition.merge(trainable, frozen)
    assert flatten(model).keys() == params.keys()
    assert all(flatten(model)[path] is params[path] for path in params)
    assert all(
        flatten(unflatten(partition.graphdef, params))[path] is params[path] for path in params
    )
