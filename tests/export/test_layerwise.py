# SPDX-License-Identifier: Apache-2.0
"""Layers that are loaded one after the other give the logits of the whole model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import tiny_steps

from dsjax import adapters
from dsjax.adapters.lora import LoraConfig
from dsjax.config import AdapterSection, MeshSection, ModelSection
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import leaf_shardings
from dsjax.export import verify
from dsjax.export.layerwise import Variant, layerwise_logits
from dsjax.models import build
from dsjax.training.partition import make_partition
from dsjax.training.setup import assemble_model, load_frozen

EXPERTS: dict[str, Any] = {"expert": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("variant", "mesh", "targets"),
    [
        ("qwen2_window", {"fsdp": 1}, ["q_proj", "down_proj"]),
        pytest.param(
            "deepseek_v3", EXPERTS, ["kv_b_proj", "experts.3.up_proj"], marks=pytest.mark.slow
        ),
        pytest.param("deepseek_v32_sparse", {"fsdp": 2}, ["o_proj"], marks=pytest.mark.slow),
        pytest.param("llama_tied", {"sequence": 2}, ["o_proj"], marks=pytest.mark.slow),
    ],
)
def test_it_gives_the_logits_of_the_whole_model(
    tmp_path: Path, variant: str, mesh: dict[str, int], targets: list[str]
) -> None:
    path = str(tiny.build_checkpoint(tmp_path, variant))
    section = ModelSection(path=path, dtype="float32")
    count = int(np.prod(list(mesh.values())))
    devices = make_mesh(MeshSection(**{"fsdp": 1} | mesh), jax.devices()[:count])
    setup = assemble_model(section, AdapterSection(), [], devices)
    setup = replace(setup, partition=setup.partition.for_inference("float32"))
    base = load_frozen(setup, 0)
    spec = LoraConfig(r=2, lora_alpha=8, target_modules=targets)
    model = build(setup.source.config, "float32")
    adapters.attach(model, spec)
    partition = make_partition(model, dtype="float32")
    own = {path: leaf for path, leaf in partition.leaves.items() if leaf.kind != "base"}
    shardings = leaf_shardings(own, devices)
    arrays = {
        path: jax.device_put(
            tiny_steps.random_array(path, leaf).astype(leaf.dtype), shardings[path]
        )
        for path, leaf in own.items()
        if leaf.kind == "adapter"
    }
    arrays |= adapters.initial_params(
        model, spec, {p: x for p, x in own.items() if x.kind == "buffer"}, shardings, 0, {}
    )
    plain = Variant(setup.model, setup.partition.leaves, {})
    adapted = Variant(model, setup.partition.leaves, arrays)
    ids = verify.sample_ids(setup)

    found = layerwise_logits(setup.source, [plain, adapted], devices, ids, "float32")

    expected = verify.sample_logits(setup, {}, base, "float32")
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5)
    whole = replace(setup, model=model, partition=partition)
    expected = verify.sample_logits(whole, {}, base | arrays, "float32")
    np.testing.assert_allclose(found[1], expected, rtol=0, atol=1e-5)
    assert np.abs(found[1] - found[0]).max() > 0.01
