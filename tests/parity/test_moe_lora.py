# SPDX-License-Identifier: Apache-2.0
"""PEFT applies every part of an adapter of DeepSeek-V2 and V3 that we write, and we of its."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_adapters
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import dsjax
from dsjax.adapters import lora
from dsjax.config import AdapterSection, MeshSection, ModelSection
from dsjax.distributed.mesh import make_mesh
from dsjax.errors import ConfigError
from dsjax.export.peft import write_peft
from dsjax.training.setup import Assembly, assemble_model
from dsjax.weights import peft

pytestmark = [
    pytest.mark.parity,
    # It looks for patterns among modules only; those of parameters it applies all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did:RuntimeWarning"),
]

BOUND = 1e-4
IDS = tiny.random_ids(288)

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
SHARED = [f"shared_experts.{name}" for name in FEED_FORWARD]
DENSE = [f"mlp.{name}" for name in FEED_FORWARD]

# What PEFT's file then says.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all_linear": (
        {"target_modules": "all-linear", "lora_dropout": 0.1},
        {
            "target_modules": [
                *("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")
            ],
            "target_parameters": [
                f"{where}.{name}.weight"
                for where in ("mlp", "shared_experts")
                for name in sorted(FEED_FORWARD)
            ],
            "lora_dropout": 0.0,
            "rank_pattern": {},
        },
    ),
    "attention": (
        {"target_modules": ["o_proj", "kv_b_proj"], "lora_dropout": 0.1},
        {"target_modules": ["kv_b_proj", "o_proj"], "lora_dropout": 0.1},
    ),
    "feed_forward_of_one_layer": (
        {"target_modules": SHARED, "layers_to_transform": [1]},
        {
            "target_modules": [],
            "target_parameters": [
                f"layers.1.mlp.shared_experts.{name}.weight" for name in sorted(FEED_FORWARD)
            ],
        },
    ),
    "patterns": (
        {
            "target_modules": ["o_proj", "kv_b_proj", "shared_experts.down_proj", "mlp.up_proj"],
            "rank_pattern": {"down_proj": 3, "o_proj": 2},
            "alpha_pattern": {r"layers\.1\..*": 9, "down_proj": 2},
            "use_rslora": True,
        },
        {"rank_pattern": {r"down_proj\.weight": 3, r"self_attn\.o_proj": 2}},
    ),
    "experts": (
        {"target_modules": [*FEED_FORWARD, "o_proj"]},
        {
            "target_modules": ["o_proj"],
            "target_parameters": [
                *("experts.down_proj", "experts.gate_up_proj"),
                *(
                    f"{where}.{n}.weight"
                    for where in ("mlp", "shared_experts")
                    for n in ("down_proj", "gate_proj", "up_proj")
                ),
            ],
            "rank_pattern": {r"experts\.gate_up_proj": 8},
            "alpha_pattern": {r"experts\.gate_up_proj": 12},
        },
    ),
    "experts_with_patterns": (
        {
            "target_modules": FEED_FORWARD,
            "use_rslora": True,
            "rank_pattern": {
                r"experts\.\d+\.down_proj": 2,
                r"layers\.2\.mlp\.experts\..*": 3,
            },
            "alpha_pattern": {r"layers\.1\..*": 11},
        },
        {
            "rank_pattern": {
                r"experts\.down_proj": 2,
                r"layers\.1\.mlp\.experts\.gate_up_proj": 8,
                r"layers\.2\.mlp\.experts\.gate_up_proj": 6,
            }
        },
    ),
    "experts_down": (
        {"target_modules": r".*experts\.\d+\.down_proj"},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
    "experts_gate_up_of_one_layer": (
        {"target_modules": r".*layers\.1.*experts\.\d+\.(gate|up)_proj"},
        {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    ),
}


def _assemble(checkpoint: Path, **fields: Any) -> Assembly:
    section = ModelSection.model_validate({"path": str(checkpoint), "dtype": "float32"})
    mesh = make_mesh(MeshSection(fsdp=1), jax.devices()[:1])
    return assemble_model(section, AdapterSection(**fields), [], mesh)


def _write(checkpoint: Path, directory: Path, **fields: Any) -> Path:
    """Write a random adapter as an export does, which reads it again and compares."""
    setup = _assemble(checkpoint, **({"peft_type": "LORA", "r": 4, "lora_alpha": 6} | fields))
    leaves, rng = setup.partition.leaves, np.random.default_rng(0)
    trained = {path: np.zeros(leaves[path].shape, np.float32) for path in setup.partition.trainable}
    for path, index in lora.tensors(setup.model, setup.spec).values():
        trained[path][index] = rng.normal(0.0, 0.1, trained[path][index].shape)
    directory.mkdir()
    write_peft(directory, setup, {path: jnp.asarray(array) for path, array in trained.items()})
    return directory


def _load_strictly(checkpoint: Path, adapter: Path) -> PeftModel:
    """Load an adapter into PEFT; fail on a key that PEFT misses, drops or changes."""
    model = PeftModel.from_pretrained(tiny.reference_model(checkpoint), adapter)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = load_file(adapter / "adapter_model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    return model.eval()


def _our_logits(checkpoint: Path, adapter: Path) -> np.ndarray:
    model = dsjax.load_pretrained(str(checkpoint), adapter=str(adapter), dtype="float32")
    return np.asarray(model(jnp.asarray(IDS)))


def _check_equal(checkpoint: Path, adapter: Path, model: PeftModel) -> None:
    ours, theirs = _our_logits(checkpoint, adapter), peft_adapters.logits(model, IDS).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUND)
    assert abs(theirs - tiny.reference_logits(checkpoint, IDS)).max() > 1  # it does something


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        pytest.param("deepseek_v3", "all_linear", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "feed_forward_of_one_layer", marks=pytest.mark.slow),
        pytest.param("deepseek_v2_groups", "patterns", marks=pytest.mark.slow),
        pytest.param("deepseek_v2_groups", "experts", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "experts_with_patterns", marks=pytest.mark.slow),
        ("deepseek_v3", "experts_gate_up_of_one_layer"),
        pytest.param("deepseek_v3", "attention", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "experts_down", marks=pytest.mark.slow),
        pytest.param("deepseek_v2_biases", "experts_with_patterns", marks=pytest.mark.slow),
        pytest.param("deepseek_v3_dense_tied", "all_linear", marks=pytest.mark.slow),
        pytest.param("deepseek_v32_sparse", "all_linear", marks=pytest.mark.slow),
        pytest.param("deepseek_v32_sparse", "experts", marks=pytest.mark.slow),
    ],
)
def test_peft_applies_what_we_write(variant: str, form: str, tmp_path: Path) -> None:
    fields, said = FORMS[form]
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    adapter = _write(checkpoint, tmp_path / "adapter", **fields)

    model = _load_strictly(checkpoint, adapter)

    config = json.loads((adapter / "adapter_config.json").read_text())
    if variant in ("deepseek_v3", "deepseek_v2_groups"):
        assert {key: config[key] for key in said} == said
    _check_equal(checkpoint, adapter, model)


@pytest.mark.slow
def test_the_merged_form_is_that_of_peft(tmp_path: Path) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", "deepseek_v3")
    fields, _ = FORMS["experts_with_patterns"]
    adapter = _write(checkpoint, tmp_path / "adapter", **fields)
    model = dsjax.load_pretrained(str(checkpoint), adapter=str(adapter), dtype="float32")

    dsjax.save_pretrained(model, str(tmp_path / "merged"))

    merged = _load_strictly(checkpoint, adapter).merge_and_unload()
    np.testing.assert_allclose(
        tiny.reference_logits(tmp_path / "merged", IDS),
        peft_adapters.logits(merged, IDS),
        rtol=0,
        atol=BOUND,
    )


@pytest.mark.parametrize(
    "variant", [pytest.param("deepseek_v2_groups", marks=pytest.mark.slow), "deepseek_v3"]
)
def test_an_adapter_that_peft_made_is_read(variant: str, tmp_path: Path) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    adapter = peft_adapters.build_lora(
        checkpoint,
        tmp_path / "adapter",
        r=4,
        lora_alpha=6,
        target_modules=["o_proj", "q_a_proj"],
        layers_to_transform=[0, 2],
        target_parameters=["shared_experts.down_proj.weight", "mlp.gate_proj.weight"],
        rank_pattern={"shared_experts.down_proj.weight": 3, r"layers\.2\.self_attn\.o_proj": 5},
        alpha_pattern={r"1\.mlp\.shared_experts\.down_proj\.weight": 20},
    )
    _check_equal(checkpoint, adapter, _load_strictly(checkpoint, adapter))
    # No layers_to_transform for parameters: layer 1 has an adapter on its shared expert.
    again = _assemble(checkpoint, path=str(adapter))
    assert again.spec.rank_of("model.layers.1.mlp.shared_experts.down_proj") == 3
    written = tmp_path / "written"
    written.mkdir()
    tensors = peft.read_params(str(adapter), again.model, again.spec, again.partition.leaves)
    write_peft(written, again, {path: jnp.asarray(array) for path, array in tensors.items()})
    _check_equal(checkpoint, written, _load_strictly(checkpoint, written))


def test_factors_that_gate_and_up_share_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", "deepseek_v3")
    # PEFT turns these into one adapter for gate and up together, and one for down.
    adapter = peft_adapters.build_lora(
        checkpoint, tmp_path / "adapter", r=2, lora_alpha=4, target_modules=FEED_FORWARD
    )
    with pytest.raises(ConfigError, match=r"experts.base_layer.lora_B.weight: got a part of the"):
        _assemble(checkpoint, path=str(adapter))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, b in tensors.items():
        if name.endswith("base_layer.lora_B.weight"):
            out, rank = b.shape[0] // 2, b.shape[1] // 2  # by rank, then by expert
            b[:out, rank:], b[out:, :rank] = 0, 0
    save_file(tensors, file, metadata={"format": "pt"})
    _check_equal(checkpoint, adapter, _load_strictly(checkpoint, adapter))
