# SPDX-License-Identifier: Apache-2.0
"""Real steps go through the TPU's own compiler, without a TPU: their kernels, buffers, collectives.

The compiler needs a process of its own: this file run as a program, which writes the compiled text
and prints what else it found.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_steps
from compiled_text import Program, by_tokens, squares

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 4608  # no width is a multiple of it

LLAMA: dict[str, Any] = tiny_steps.SHAPE | {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 16384,
}
"""1.3B parameters."""

V3: dict[str, Any] = LLAMA | tiny_steps.V3
V3 |= {
    "num_hidden_layers": 8,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_key_value_heads": 16,
}
"""A small DeepSeek-V3 of three dense layers and five with experts."""

ATTENTION = {
    "splash_mha_fwd_segmented_residuals": 2,  # forward, and again
    "splash_mha_dq_segmented_no_residuals": 1,
    "splash_mha_dkv_segmented_no_residuals": 1,
}
"""Calls of attention's kernels in one stack of layers."""


@dataclass(frozen=True)
class Case:
    """A step for four chips.

    Attributes:
        shape: of the model.
        targets: of LoRA; None trains everything.
        mesh: sizes of its axes.
        rows: of a batch, each of LENGTH tokens.
        stacks: layers of each stack, a number that no other dimension has.
        kernels: calls of each.
        largest: numbers of the largest array that grows with the tokens of a row.
        temporaries: bytes of a chip that are not reached.
    """

    shape: Mapping[str, Any]
    targets: str | list[str] | None
    mesh: Mapping[str, int]
    rows: int
    stacks: set[int]
    kernels: Mapping[str, int]
    largest: int
    temporaries: int


CASES = {
    "lora": Case(
        shape=LLAMA,
        targets="all-linear",
        mesh={"fsdp": 4},
        rows=4,
        stacks={24},
        kernels=ATTENTION,
        largest=24 * LENGTH * 2048,  # what the layers keep for the backward pass
        temporaries=2 * 2**30,
    ),
    "full": Case(
        shape=LLAMA | {"num_hidden_layers": 6},
        targets=None,
        mesh={"fsdp": 4},
        rows=4,
        stacks={6},
        kernels=ATTENTION,
        largest=6 * LENGTH * 2048,
        temporaries=2 * 2**30,
    ),
    "experts": Case(
        shape=V3,
        targets=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        mesh={"fsdp": 2, "expert": 2},
        rows=4,
        stacks={3, 5},
        # Three products of experts: forward, again, and back to the rows.
        kernels={name: 2 * count for name, count in ATTENTION.items()} | {"gmm": 9},
        # The rows that are sorted by expert: each token of two chips once for each of its experts.
        # Once for each expert that a chip holds, 16, they were larger even at the experts' width.
        largest=2 * LENGTH * 6 * 2048,
        temporaries=3 * 2**30,
    ),
}


def _compiled(name: str, folder: Path) -> tuple[dict[str, Any], Program]:
    """What a process of its own finds of a case."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, __file__, name, str(folder / "text")],
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return found, Program((folder / "text").read_text(), found["temporaries"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_compiles_for_a_tpu(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found, program = _compiled(name, tmp_path)

    assert found["device"] == "TPU v5"
    # A chip holds its share of what is frozen in bfloat16, of what trains in float32 three times.
    trains = pytest.approx(found["trains"] * 12, rel=0.01, abs=2**19)  # each array fills its tiles
    assert found["arguments"] - found["frozen"] * 2 == trains
    assert found["aliased"] == trains  # it is donated
    assert 0 < program.temporaries < case.temporaries

    assert program.kernels() == case.kernels
    shapes = program.shapes()
    assert squares(shapes, LENGTH) == []
    assert by_tokens(shapes, LENGTH, case.largest + 1) == []
    assert by_tokens(shapes, LENGTH, LENGTH * 2048) != []
    # Logits are computed for some of a row's tokens at a time.
    assert [shape for shape in shapes if 32000 in shape and LENGTH in shape] == []
    # Weights are taken a layer at a time, and stay as they lie; adapters are small.
    matrices = [shape for shape in program.gathered() if math.prod(shape) >= 2048 * 512]
    assert matrices != []
    assert [shape for shape in matrices if case.stacks & set(shape)] == []
    rearranged = [sorted(shape) for shape in program.rearranged("bf16|f32")]
    assert [shape for shape in rearranged if shape in found["stacks"]] == []
    # Of a matrix that is divided, each chip sums the gradient's part that it holds.
    assert [shape for shape in program.summed() if math.prod(shape) >= 2048 * 512] == []


def _compile(case: Case, text: Path) -> dict[str, Any]:
    """Compile the step on abstract arrays; what its memory is."""
    from jax.experimental import topologies

    from dsjax import adapters
    from dsjax.adapters.lora import LoraConfig
    from dsjax.config import MeshSection
    from dsjax.distributed.mesh import make_mesh
    from dsjax.distributed.sharding import leaf_shardings
    from dsjax.models import build
    from dsjax.training.partition import make_partition
    from dsjax.training.state import step_config
    from dsjax.training.step import lower_train_step

    config = tiny_steps.run_config(
        {"dtype": "bfloat16"},
        training={"gradient_checkpointing": "full", "batch_size": case.rows},
    )
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    mesh = make_mesh(MeshSection(**case.mesh), topology.devices)
    model = build(case.shape, "bfloat16")
    if case.targets:
        adapters.attach(model, LoraConfig(r=16, lora_alpha=32, target_modules=case.targets))
    partition = make_partition(model, dtype="bfloat16")
    parts = step_config(config, partition, mesh, total_steps=10)
    shardings = leaf_shardings(partition.leaves, mesh)
    compiled = lower_train_step(parts, case.rows, LENGTH).compile()
    memory = compiled.memory_analysis()
    text.write_text(compiled.as_text())

    def per_chip(paths: Any) -> int:
        return sum(math.prod(shardings[p].shard_shape(partition.leaves[p].shape)) for p in paths)

    weights = {path: leaf for path, leaf in partition.leaves.items() if leaf.kind == "base"}
    stacks = [path for path, leaf in weights.items() if len(leaf.shape) > 2]
    return {
        "device": topology.devices[0].device_kind,
        "frozen": per_chip(partition.frozen),
        "trains": per_chip(partition.trainable),
        "stacks": [sorted(shardings[p].shard_shape(weights[p].shape)) for p in stacks],
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(_compile(CASES[sys.argv[1]], Path(sys.argv[2]))))
