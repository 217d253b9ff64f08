# SPDX-License-Identifier: Apache-2.0
"""The LoRA step of a V2-Lite goes through the CUDA compiler, for one GPU and for eight."""

import json
import math
from pathlib import Path

import h100
import pytest
import tiny_steps
from compiled_text import by_tokens, squares

from dsjax import adapters
from dsjax.adapters.lora import LoraConfig
from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.models import Quantization, base_shapes, build, stored_linears
from dsjax.training.partition import make_partition
from dsjax.training.state import step_config
from dsjax.training.step import lower_train_step

pytestmark = pytest.mark.cuda_compiler

CONFIG = Path(__file__).parents[1] / "model_configs/deepseek_v2_lite/config.json"
V2_LITE = json.loads(CONFIG.read_text()) | {"num_hidden_layers": 8, "first_k_dense_replace": 3}
"""DeepSeek-V2-Lite but for its 27 layers, of which 1 is dense."""

STACKS = {3, 5}  # dense layers, layers with experts: no other dimension is 3 or 5
LENGTH = 4608  # no width is a multiple of it


@pytest.mark.parametrize("count, mesh", [(1, {}), (8, {"fsdp": 2, "expert": 4})])
def test_the_lora_step_runs_the_kernels_and_takes_weights_a_layer_at_a_time(
    count: int, mesh: dict[str, int]
) -> None:
    config = tiny_steps.run_config(
        {"dtype": "bfloat16"}, training={"gradient_checkpointing": "full", "batch_size": count}
    )
    model = build(V2_LITE, "bfloat16")
    adapters.attach(model, LoraConfig(r=16, lora_alpha=32))
    on = make_mesh(MeshSection(**mesh), h100.devices(count))
    parts = step_config(config, make_partition(model, dtype="bfloat16"), on, total_steps=10)
    program = h100.compiled(lower_train_step(parts, count, LENGTH))

    # Both stacks, dense and sparse, attend once forward and once more for the gradients.
    assert program.kernels() == {
        "attention": 4,
        "attention_query_gradient": 2,
        "attention_key_gradients": 2,
        "grouped_matmul": 9,  # three products: forward, again, and back to the rows
    }
    shapes = program.shapes()
    assert squares(shapes, LENGTH) == []
    assert by_tokens(shapes, LENGTH, 64 * LENGTH * 1408) == []
    assert by_tokens(shapes, LENGTH, LENGTH * 2048) != []
    gathered = program.gathered()
    assert (gathered == set()) == (count == 1)
    assert [shape for shape in gathered if STACKS & set(shape)] == []
    # What is frozen is bfloat16 and stays as it lies; adapters are float32 and small.
    assert [shape for shape in program.rearranged("bf16") if STACKS & set(shape)] == []


@pytest.mark.parametrize(
    ("kind", "remat"), [("nf4", "none"), ("nf4_double", "full"), ("int8", "dots"), ("fp8", "none")]
)
def test_no_stack_of_quantized_matrices_is_there_in_full_precision(kind: str, remat: str) -> None:
    training = {"gradient_checkpointing": remat, "batch_size": 1}
    config = tiny_steps.run_config({"dtype": "bfloat16"}, training=training)
    blocks = {"quantization_config": {"weight_block_size": [128, 128]}}
    base, _, double = kind.partition("_")
    model = build(V2_LITE | blocks, "bfloat16", Quantization(base, bool(double)))
    adapters.attach(model, LoraConfig(r=16, lora_alpha=32))
    partition = make_partition(model, dtype="bfloat16")
    on = make_mesh(MeshSection(), h100.devices(1))
    parts = step_config(config, partition, on, total_steps=10)
    length = 8064  # which the loss takes in 4 chunks, neither stack's size
    program = h100.compiled(lower_train_step(parts, 1, length))

    shapes = base_shapes(model)
    matrices = {tuple(sorted(shapes[path][-2:])) for path in stored_linears(model)}
    numbers = {math.prod(matrix) for matrix in matrices}
    held = {leaf.shape for leaf in partition.leaves.values()}
    decoded = {
        shape for shape in program.shapes() - held if tuple(sorted(shape[-2:])) in matrices
    } | {shape for shape in program.shapes() - held if math.prod(shape[1:]) in numbers}
    assert [shape for shape in decoded if shape[0] in STACKS] == []
    assert decoded  # of one layer
