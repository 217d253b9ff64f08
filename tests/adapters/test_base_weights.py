# SPDX-License-Identifier: Apache-2.0
"""A method that computes with the weights it changes, in its slot and in its first values.

The method here is one for tests: W + B A with the lengths of its rows trained apart, as DoRA
(arXiv 2402.09353) has it. It is this file and its entry in the registry.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_steps
from flax import nnx

from dsjax import adapters
from dsjax.adapters.ia3 import IA3Config
from dsjax.adapters.method import AdapterMethod
from dsjax.adapters.targets import TargetPattern, chosen, linear_modules, module_at
from dsjax.config import AdapterSection, MeshSection, ModelSection
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import make_layout
from dsjax.models import Model
from dsjax.models.layers import product
from dsjax.models.moe import ExpertLinear
from dsjax.models.ops.grouped_matmul import grouped_matmul
from dsjax.models.parameters import AdapterParam, abstract, stacked_axes
from dsjax.training.setup import Assembly, assemble_model, load_frozen, load_trainable

RANK = 2


class RowsConfig(IA3Config):
    """Its targets; they are found as IA3's are."""

    peft_type = "ROWS"


class Rows(nnx.Module):
    """The lengths of the rows, and a low-rank change of their directions."""

    def __init__(self, linear: Any):
        lead = ("experts",) if isinstance(linear, ExpertLinear) else ()
        count = (linear.experts,) if lead else ()
        rows, columns = linear.out_features, linear.in_features
        out_axis, in_axis = linear.axes

        def declare(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> AdapterParam:
            axes = stacked_axes((*lead, *axes), linear.layers)
            return AdapterParam(abstract((*count, *shape), linear.layers), axes=axes)

        self.length = declare((rows,), (out_axis,))
        self.low = declare((RANK, columns), (None, in_axis))
        self.high = declare((rows, RANK), (out_axis, None))

    def __call__(self, x: jax.Array, linear: Any, other: Any) -> jax.Array:
        """In float32; `other` is the sizes of the experts' groups, or a dropout."""
        weight, wide = self.merged_weight(linear.weight.astype(jnp.float32)), x.astype(jnp.float32)
        y = product(wide, weight) if weight.ndim == 2 else grouped_matmul(wide, weight, other)
        return (y if linear.bias is None else y + linear.bias).astype(x.dtype)

    def merged_weight(self, weight: jax.Array) -> jax.Array:
        low, high = self.low[...], self.high[...]
        moved = weight + jnp.einsum("...or,...ri->...oi", high, low, precision="highest")
        return moved * (self.length[...] / jnp.linalg.norm(moved, axis=-1))[..., None]


def attach(model: Model, config: RowsConfig) -> None:
    for path, names in linear_modules(model).items():
        if chosen(TargetPattern(config.target_modules), names):
            linear = module_at(model, path)
            linear.adapter = Rows(linear)


def initial(
    path: str, leaf: Any, model: Model, key: jax.Array, base: Mapping[str, jax.Array]
) -> jax.Array:
    if path.endswith(".high"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    if path.endswith(".low"):
        return jax.random.normal(key, leaf.shape, leaf.dtype)
    (weight,) = base.values()
    return jnp.linalg.norm(weight.astype(jnp.float32), axis=-1)


def initial_reads(path: str) -> list[str]:
    linear, _, name = path.partition(".adapter.")
    return [f"{linear}.weight"] if name == "length" else []


def _no_file(*_: Any) -> Any:
    raise AssertionError("nothing is written here")


ROWS = AdapterMethod(
    keys=("target_modules",),
    from_section=lambda section: RowsConfig(section.target_modules, []),
    peft_problems=_no_file,
    from_peft=_no_file,
    attach=attach,
    initial=initial,
    initial_reads=initial_reads,
    config_fields=_no_file,
    shapes=_no_file,
    to_file=_no_file,
    from_file=_no_file,
    merged=None,
)

CASES = {
    "llama": ("llama_biases", {}, ["q_proj", "down_proj"], {"fsdp": 8}),
    "v3": (
        "deepseek_v3",
        {"attention_bias": True},
        ["q_a_proj", "kv_b_proj", "o_proj", "up_proj"],
        {"fsdp": 2, "expert": 2, "tensor": 2},
    ),
}
"""Checkpoint, changes to it, targets, mesh."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's one new entry, where `adapters` and `weights.adapter` look."""
    registry = MappingProxyType({**adapters.ADAPTERS, "ROWS": ROWS})
    monkeypatch.setattr(adapters, "ADAPTERS", registry)
    monkeypatch.setattr("dsjax.weights.adapter.ADAPTERS", registry)


def _assembled(folder: Path, case: str) -> Assembly:
    variant, changes, targets, mesh = CASES[case]
    path = tiny.build_checkpoint(folder, variant, **changes)
    section = AdapterSection(target_modules=targets).model_copy(update={"peft_type": "ROWS"})
    model = ModelSection(path=str(path), dtype="float32")
    return assemble_model(model, section, [], make_mesh(MeshSection(**mesh)))


@pytest.mark.parametrize("case", ["llama", pytest.param("v3", marks=pytest.mark.slow)])
def test_it_begins_as_the_model_that_it_is_for(tmp_path: Path, case: str) -> None:
    setup = _assembled(tmp_path, case)
    frozen = load_frozen(setup, 0)
    trainable = load_trainable(setup, frozen, 0)

    lengths = [path for path in trainable if path.endswith(".length")]
    assert {path.split(".")[-3] for path in lengths} == set(CASES[case][2])
    for path in lengths:
        weight = np.asarray(frozen[initial_reads(path)[0]])
        np.testing.assert_allclose(trainable[path], np.linalg.norm(weight, axis=-1), rtol=1e-6)
        assert trainable[path].sharding == setup.shardings[path]
    ids = tiny.random_ids(setup.model.config.vocab_size, batch=8, length=12)
    layout = make_layout(setup.mesh)

    @jax.jit
    def logits(trainable, frozen, ids):
        model = setup.partition.merge(trainable, frozen)
        return model.head(model.hidden(ids, layout=layout).states)

    found = logits(trainable, frozen, jax.device_put(ids, layout.rows))
    expected = tiny.reference_logits(tmp_path, ids)
    assert tiny_steps.distance(np.asarray(found), expected) < 1e-5
    moved = {p: 1.5 * a if p.endswith("length") else a for p, a in trainable.items()}
    assert tiny_steps.distance(np.asarray(logits(moved, frozen, ids)), expected) > 1e-2


@pytest.mark.slow
def test_it_trains_alike_on_a_mesh() -> None:
    config, mesh = RowsConfig(CASES["llama"][2], []), CASES["llama"][3]
    shape = {"attention_bias": True}
    one = tiny_steps.two_steps(tiny_steps.start(shape, config))
    many = tiny_steps.start(shape, config, mesh=mesh)
    tiny_steps.assert_same(tiny_steps.two_steps(many), one)
