# SPDX-License-Identifier: Apache-2.0
"""LoRA adapts the modules that PEFT adapts, with its ranks and scalings, from its start."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_steps
import torch
from flax import nnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from dsjax import adapters
from dsjax.adapters import lora, lora_peft
from dsjax.adapters.lora import Lora
from dsjax.adapters.lora import LoraConfig as OurLoraConfig
from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import leaf_shardings
from dsjax.errors import ConfigError
from dsjax.models import build
from dsjax.models.layers import Linear
from dsjax.models.slots import Dropout
from dsjax.training.partition import make_partition

SHAPE = tiny_steps.SHAPE | {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24}
Modules = dict[str, tuple[int, float, tuple[int, ...], tuple[int, ...]]]


def _peft(fields: Mapping[str, Any], **shape: Any) -> PeftModel:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that match nothing, or with use_rslora
        model = tiny.CONFIGS["llama"](
            **{k: v for k, v in (SHAPE | shape).items() if k != "model_type"}
        )
        base = tiny.AutoModelForCausalLM.from_config(model)
        return get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, **fields))


def _peft_modules(model: PeftModel) -> Modules:
    """Adapted module -> rank, scaling, shapes of A and B."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, part)["default"].weight.shape for part in ("lora_A", "lora_B"))
            name = name.removeprefix("base_model.model.")
            found[name] = (module.r["default"], module.scaling["default"], tuple(a), tuple(b))
    return found


def _our_modules(fields: Mapping[str, Any], **shape: Any) -> tuple[Modules, dict[str, Any], int]:
    """The same of ours, the config that is exported, and the number of trained parameters."""
    model = build(SHAPE | shape, "float32")
    spec = OurLoraConfig(**fields)
    adapters.attach(model, spec)
    partition = make_partition(model)
    shapes = {}
    for key, (path, index) in lora.tensors(model, spec).items():
        array = np.broadcast_to(np.float32(0), partition.leaves[path].shape)
        shapes[key.removeprefix("base_model.model.").removesuffix(".weight")] = array[index].shape
    names = [key.removesuffix(".lora_A") for key in shapes if key.endswith(".lora_A")]
    modules = {
        name: (
            spec.rank_of(name),
            spec.scaling_of(name),
            shapes[f"{name}.lora_A"],
            shapes[f"{name}.lora_B"],
        )
        for name in names
    }
    return modules, lora_peft.config_fields(model, spec), partition.counts()[0]


SHORT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = [*SHORT, "lm_head", "self_attn.v_proj", "mlp.down_proj", "layers.1.self_attn.q_proj"]
NAMES += ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.k_proj"]
EXPRESSIONS = [
    r".*\.(q|v)_proj",
    r"model\.layers\.[02]\..*_proj",
    r".*mlp.*",
    r".*layers\.1\..*o_proj",
]
PATTERNS = [*NAMES, r".*\.[qk]_proj", r"layers\.1\..*", r"^model.layers.0.self_attn.q_proj"]
PATTERNS += [r"(gate|up)_proj", r"model\.layers\.\d\.mlp\..*", r"proj"]


# A module that is named whole is adapted whatever layers_to_transform says.
DIRECT = {
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["lm_head", "q_proj", "model.layers.0.mlp.up_proj"],
    "layers_to_transform": [1],
}


@st.composite
def _fields(draw: st.DrawFn) -> dict[str, Any]:
    some = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
    wanted = draw(st.just("all-linear") | st.sampled_from(EXPRESSIONS) | some)
    ranks = st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 7), max_size=3)
    alphas = st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([1, 8, 2.5]), max_size=2)
    fields = {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.sampled_from([1, 16, 0.5])),
        "target_modules": wanted,
        "rank_pattern": draw(ranks),
        "alpha_pattern": draw(alphas),
        "use_rslora": draw(st.booleans()),
        "exclude_modules": draw(st.none() | st.sampled_from(EXPRESSIONS) | some),
    }
    if wanted == "all-linear" or isinstance(wanted, list):
        layers = st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True)
        fields["layers_to_transform"] = draw(st.none() | layers)
    return fields


@settings(max_examples=40)
@example(DIRECT)
@example({"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.1\..*"})
@example(DIRECT | {"exclude_modules": ["up_proj", "layers.1.self_attn.q_proj"]})
@example({"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "exclude_modules": ["v_proj"]})
@given(_fields())
def test_modules_ranks_and_scalings_are_those_of_peft(fields: dict[str, Any]) -> None:
    try:
        ours, exported, count = _our_modules(fields)
    except ConfigError as error:
        # PEFT takes a pattern that matches nothing; a target that does, it refuses too.
        assume("matches no adapted module" not in str(error))
        assume("matches no linear module" not in str(error))
        with pytest.raises(ValueError, match="No modules were targeted|not found in the|excluded"):
            _peft(fields)
        return

    expected = {
        name: (rank, pytest.approx(scaling), a, b) for name, (rank, scaling, a, b) in ours.items()
    }
    peft = _peft(exported)
    assert _peft_modules(peft) == expected
    assert peft.get_nb_trainable_parameters()[0] == count
    # These PEFT does not take: an expression that matches a whole MLP too, a word with layers.
    if fields["target_modules"] not in (r".*mlp.*", r".*layers\.1\..*", "all-linear"):
        assert _peft_modules(_peft(fields)) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_peft(tied: bool) -> None:
    fields = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 5},
    }
    model = build(SHAPE | {"tie_word_embeddings": tied}, "float32")
    adapters.attach(model, OurLoraConfig(**fields))

    peft = _peft(fields, tie_word_embeddings=tied)

    assert make_partition(model).counts() == peft.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["q_prj", "up_proj"]},
            r"adapter.target_modules: got 'q_prj', which matches no linear module; did you",
        ),
        (
            {"target_modules": "q_proj"},
            r"got 'q_proj', which matches no linear module; write a list to name",
        ),
        ({"target_modules": "*_proj"}, r"got '\*_proj', expected a regular expression, a list"),
        (
            {"layers_to_transform": [0, 3]},
            r"adapter.layers_to_transform: got \[3\], expected indices from 0 to 2",
        ),
        (
            {"target_modules": r".*q_proj", "layers_to_transform": [1]},
            r"adapter.layers_to_transform: got it beside a regular expression",
        ),
        (
            {"target_modules": ["layers.0.mlp.up_proj"], "layers_to_transform": [1]},
            r"adapter.target_modules: got \['layers.0.mlp.up_proj'\], which matches nothing",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}},
            r"adapter.rank_pattern: got 'v_proj', which matches no adapted module; did you",
        ),
        (
            {"alpha_pattern": {"lm_head": 4}},
            r"adapter.alpha_pattern: got 'lm_head', which matches no",
        ),
        (
            {"exclude_modules": ["q_prj"]},
            r"adapter.exclude_modules: got 'q_prj', which matches no linear module; did you",
        ),
        (
            {"exclude_modules": "q_proj"},
            r"adapter.exclude_modules: got 'q_proj', which matches no linear module; write a list",
        ),
        (
            {"exclude_modules": "("},
            r"adapter.exclude_modules: got '\(', expected a regular expression or a list",
        ),
        (
            {"rank_pattern": {"(": 4}},
            r"adapter.rank_pattern: got '\(', expected a regular expression",
        ),
    ],
)
def test_what_matches_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _our_modules({"r": 4, "lora_alpha": 8} | fields)


def test_a_tied_head_is_no_target() -> None:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]}
    with pytest.raises(ConfigError, match="got 'lm_head', .*the head is the embedding"):
        _our_modules(fields, tie_word_embeddings=True)


def test_rows_beyond_a_layers_rank_stay_zero() -> None:
    spec = OurLoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 5, "up_proj": 3},
    )
    run = tiny_steps.start({"num_hidden_layers": 3}, spec, optimizer={"weight_decay": 0.5})
    ranks = {"model.layers.self_attn.q_proj": (5, 0, 2), "model.layers.mlp.up_proj": (3, 0, 3)}

    for seed in range(5):
        run.step(tiny_steps.batch(seed=seed))

    trained = run.trainable()
    assert {path.partition(".adapter.")[0] for path in trained} == set(ranks)
    for path, own in ranks.items():
        for layer, rank in enumerate(own):
            a = trained[f"{path}.adapter.lora_A"][layer]
            b = trained[f"{path}.adapter.lora_B"][layer]
            assert a[:rank].all() and b[:, :rank].all()
            assert not a[rank:].any() and not b[:, rank:].any()


def _initial(spec: OurLoraConfig, mesh: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    model = tiny_steps.model_of()
    adapters.attach(model, spec)
    leaves = make_partition(model).leaves
    section = MeshSection(**mesh)
    devices = jax.devices()[: section.data * section.fsdp * section.tensor]
    shardings = leaf_shardings(leaves, make_mesh(section, devices))
    params = adapters.initial_params(model, spec, leaves, shardings, seed, {})
    assert all(params[path].sharding == shardings[path] for path in params)
    return {path: np.asarray(array) for path, array in params.items()}


def test_the_start_depends_on_seed_and_path_but_not_on_the_mesh() -> None:
    spec = OurLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "lm_head"])
    one = _initial(spec, {"fsdp": 1})
    many = _initial(spec, {"fsdp": 2, "tensor": 2, "data": 2})
    assert one.keys() == many.keys()
    assert all(one[path].tobytes() == many[path].tobytes() for path in one)
    q, o = (one[f"model.layers.self_attn.{name}.adapter.lora_A"] for name in ("q_proj", "o_proj"))
    assert not set(q.ravel()) & set(o.ravel()) and not set(q[0].ravel()) & set(q[1].ravel())
    other = _initial(spec, {"fsdp": 1}, seed=1)
    assert not set(other["lm_head.adapter.lora_A"].ravel()) & set(
        one["lm_head.adapter.lora_A"].ravel()
    )
    assert not any(array.any() for path, array in one.items() if path.endswith("lora_B"))
    np.testing.assert_array_equal(one["model.layers.self_attn.q_proj.adapter.scaling"], [2, 2])


def test_the_start_is_distributed_like_that_of_peft() -> None:
    shape = (2, 64, 256)
    model = build(SHAPE | {"intermediate_size": 256, "num_hidden_layers": 2}, "float32")
    spec = OurLoraConfig(r=64, lora_alpha=8, target_modules=["down_proj"])
    adapters.attach(model, spec)
    path = "model.layers.mlp.down_proj.adapter.lora_A"
    ours = np.asarray(
        lora.initial(path, make_partition(model).leaves[path], model, jax.random.key(0), {})
    )
    assert ours.shape == shape

    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(256, 16))
    peft = get_peft_model(linear, LoraConfig(r=64, target_modules=["0"])).base_model.model[0]
    theirs = peft.lora_A["default"].weight.detach().numpy()

    assert abs(ours).max() <= 1 / 16 and abs(theirs).max() <= 1 / 16
    quantiles = np.linspace(0.05, 0.95, 10)
    # 32,768 and 16,384 draws over a width of 1/8: a quantile is off by 0.0004 or so.
    np.testing.assert_allclose(
        np.quantile(ours, quantiles), np.quantile(theirs, quantiles), rtol=0, atol=0.003
    )


def _one_lora(path: str = "module", p: float = 0.25) -> Lora:
    """An adapter of one map of 8 inputs to 1 output that adds twice the sum of its inputs."""
    linear = Linear(8, 1, ("heads", "embed"))
    module = Lora(linear, path, [1], [2.0], p)
    values = {"lora_A": jnp.ones((1, 8)), "lora_B": jnp.ones((1, 1)), "scaling": jnp.float32(2.0)}
    return nnx.merge(
        nnx.graphdef(module), nnx.from_flat_state({(k,): v for k, v in values.items()})
    )


def test_dropout_keeps_the_expectation_and_is_off_without_a_key() -> None:
    x, y = jnp.ones((1, 4096, 8)), jnp.full((1, 4096, 1), 0.5)
    module = _one_lora()

    dropout = Dropout(jax.random.key(0), jnp.arange(4096)[None])

    update = np.asarray(module(x, lambda _: y, dropout))[0] - 0.5

    kept = update / 2 * 0.75  # number of inputs kept: dropout divides by 1 - p
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-5)
    assert set(np.round(kept).astype(int).ravel()) >= {3, 4, 5, 6, 7, 8}
    # 32,768 draws: the mean's standard deviation is 0.0024 of the 16 that are expected, times 16.
    assert update.mean() == pytest.approx(16.0, abs=0.2)
    np.testing.assert_array_equal(module(x, lambda _: y, None), y + 16)
    np.testing.assert_array_equal(_one_lora(p=0.0)(x, lambda _: y, dropout), y + 16)


def test_dropout_differs_from_module_to_module() -> None:
    x, y = jnp.ones((1, 64, 8)), jnp.zeros((1, 64, 1))
    dropout = Dropout(jax.random.key(0), jnp.arange(64)[None])
    updates = [np.asarray(_one_lora(path)(x, lambda _: y, dropout)) for path in ("a", "b", "a")]
    assert (updates[0] != updates[1]).any()
    np.testing.assert_array_equal(updates[0], updates[2])


@pytest.mark.parametrize(
    ("wanted", "layers", "written"),
    [
        ("all-linear", [1], sorted(SHORT)),
        (r".*\.(q|v)_proj", None, ["q_proj", "v_proj"]),
        (r".*mlp.*", None, ["down_proj", "gate_proj", "up_proj"]),
        (
            r".*layers\.[02]\..*o_proj|lm_head",
            None,
            ["lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 2))],
        ),
        (["v_proj", "q_proj"], [0, 2], ["q_proj", "v_proj"]),
    ],
)
def test_the_exported_config_lists_its_modules(
    wanted: str | list[str], layers: list[int] | None, written: list[str]
) -> None:
    fields = {"r": 2, "lora_alpha": 4, "target_modules": wanted, "layers_to_transform": layers}
    assert _our_modules(fields)[1]["target_modules"] == written
