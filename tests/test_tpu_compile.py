# SPDX-License-Identifier: Apache-2.0
"""The real LoRA step of a 1.3B Llama goes through the TPU's own compiler, without a TPU.

The compiler needs a process of its own: this file run as a program, which prints what it found.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LENGTH, ROWS = 4096, 4  # one row per chip


@pytest.mark.slow
def test_the_lora_step_compiles_for_a_tpu() -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["device"] == "TPU v5"
    # A chip holds its share of the weights in bfloat16, of the adapters in float32 three times.
    expected = found["base"] * 2 + found["adapter"] * 12
    assert found["arguments"] == pytest.approx(expected, rel=0.01)
    assert found["aliased"] == pytest.approx(found["adapter"] * 12, rel=0.01)  # it is donated
    # Logits of a chunk of 2048 tokens are the largest float array; scores are nowhere.
    assert 0 < found["temporaries"] < 2 * 2**30
    assert [shape for shape in found["shapes"] if shape.count(LENGTH) >= 2] == []
    assert [shape for shape in found["shapes"] if LENGTH in shape and 32256 in shape] == []
    assert [shape for shape in found["shapes"] if LENGTH in shape and 2048 in shape] != []
    assert found["kernels"] == 4  # attention forward, again, and its two backward kernels


def _compile() -> dict[str, Any]:
    """Compile the step on abstract arrays; what its memory and its buffers are."""
    import in_memory
    from jax.experimental import topologies

    from dsjax import adapters
    from dsjax.adapters.lora import LoraSpec
    from dsjax.config import MeshSection
    from dsjax.models import build
    from dsjax.partition import decide
    from dsjax.sharding import leaf_shardings, make_mesh
    from dsjax.step import lower_train_step, step_config

    shape = in_memory.SHAPE | {
        "vocab_size": 32256,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 16384,
    }
    config = in_memory.run_config(
        {"dtype": "bfloat16"},
        training={"gradient_checkpointing": "full", "batch_size": ROWS},
    )
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    mesh = make_mesh(MeshSection(fsdp=4), topology.devices)
    model = build(shape, "bfloat16")
    adapters.attach(model, LoraSpec(r=16, lora_alpha=32))
    partition = decide(model, dtype="bfloat16")
    parts = step_config(config, partition, mesh, total_steps=10)
    shardings = leaf_shardings(partition.leaves, mesh)
    compiled = lower_train_step(parts, ROWS, LENGTH).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    floats = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", text)

    def per_chip(kind: str) -> int:
        leaves = {path: leaf for path, leaf in partition.leaves.items() if leaf.kind == kind}
        return sum(math.prod(shardings[p].shard_shape(leaf.shape)) for p, leaf in leaves.items())

    return {
        "device": topology.devices[0].device_kind,
        "base": per_chip("base"),
        "adapter": per_chip("adapter"),
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "shapes": sorted({tuple(map(int, shape.split(","))) for shape in floats}),
    }


if __name__ == "__main__":
    print(json.dumps(_compile()))
