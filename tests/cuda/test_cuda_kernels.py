# SPDX-License-Identifier: Apache-2.0
"""Attention and experts go through the CUDA compiler, without a GPU: their kernels and buffers.

The compiler also counts the shared memory of each kernel and refuses one that asks for too much.
"""

from typing import Any, NamedTuple

import h100
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_text import by_tokens, squares
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.models.ops import attention_cuda
from dsjax.models.ops.attention import Tokens, dot_product_attention, kernel_for
from dsjax.models.ops.attention_cuda import attend_cuda, attend_part_cuda
from dsjax.models.ops.attention_cudnn import attend_cudnn, cuts_of
from dsjax.models.ops.grouped_matmul import grouped_matmul

pytestmark = pytest.mark.cuda_compiler


class Heads(NamedTuple):
    """Tokens of a row, heads, kv heads, head size, value head size."""

    length: int
    heads: int
    kv_heads: int
    size: int
    value_size: int

    def arrays(self, target: str, dtype: Any = jnp.bfloat16) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Queries, keys, values and segments of one row."""
        kinds = (
            (self.heads, self.size),
            (self.kv_heads, self.size),
            (self.kv_heads, self.value_size),
        )
        qkv = tuple(_abstract((1, self.length, *kind), dtype, target) for kind in kinds)
        return (*qkv, _abstract((1, self.length), jnp.int32, target))


HEADS = {
    "V2-Lite": Heads(4096, 16, 16, 192, 128),
    "V3": Heads(4096, 128, 128, 192, 128),
    "Llama 8B": Heads(4096, 32, 8, 128, 128),
    "Llama 8B, long": Heads(32768, 32, 8, 128, 128),
    "a last block that is not full": Heads(4001, 6, 2, 64, 64),
}
KERNELS = {"attention": 1, "attention_query_gradient": 1, "attention_key_gradients": 1}


def _abstract(shape: tuple[int, ...], dtype: Any, target: str) -> jax.ShapeDtypeStruct:
    mesh = Mesh(np.array(h100.devices(1, target)), ("data",))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _sum_of_squares(function: Any, *constants: Any) -> Any:
    """A loss whose gradients ask for everything."""
    return lambda *arrays: jnp.sum(jnp.square(function(*arrays, *constants).astype(jnp.float32)))


@pytest.mark.parametrize("target", ["h100_sxm", "a100_sxm_80"])
@pytest.mark.parametrize("name", HEADS)
def test_attention_holds_no_scores(name: str, target: str) -> None:
    heads = HEADS[name]
    gradients = jax.grad(_sum_of_squares(attend_cuda, 0.1), (0, 1, 2))
    program = h100.compiled(h100.lowered(gradients, *heads.arrays(target)))

    assert program.kernels() == KERNELS
    assert squares(program.shapes(), heads.length) == []
    # The result, its gradient, and two float32 numbers of each query are what there must be.
    queries = heads.length * heads.heads
    assert program.temporaries < 1.1 * queries * (2 * heads.value_size * 2 + 2 * 4)


@pytest.mark.parametrize("target", ["h100_sxm", "a100_sxm_80"])
@pytest.mark.parametrize("name", ["V2-Lite", "Llama 8B, long"])
def test_a_part_of_the_queries_holds_no_scores(name: str, target: str) -> None:
    heads = HEADS[name]
    queries = heads._replace(length=heads.length // 16)
    q, _, _, q_segment = queries.arrays(target)
    _, *keys, segment = heads.arrays(target)

    def loss(q: Any, k: Any, v: Any, *segments: Any) -> jax.Array:
        out = attend_part_cuda(q, k, v, *segments, jnp.int32(5), 0.1)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    gradients = jax.grad(loss, (0, 1, 2))
    program = h100.compiled(h100.lowered(gradients, q, *keys, q_segment, segment))
    assert program.kernels() == KERNELS
    scores = {queries.length, heads.length}
    assert [shape for shape in program.shapes() if scores <= set(shape)] == []


CUDNN = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.mark.parametrize("name", HEADS)
def test_hoppers_attention_is_cudnns_and_holds_no_scores(name: str) -> None:
    """Forward and backward: whole rows, and packed ones in each cut where values are as wide."""
    heads = HEADS[name]
    shape = (1, heads.length, heads.heads, heads.size)
    cuts = cuts_of(shape, heads.kv_heads, heads.value_size)
    gradients = jax.grad(_sum_of_squares(attend_cudnn, 0.1), (0, 1, 2))
    program = h100.compiled(h100.lowered(gradients, *heads.arrays("h100_sxm")))

    for target in CUDNN:
        assert program.text.count(f'custom_call_target="{target}"') == 1 + len(cuts)
    assert program.kernels() == KERNELS  # rows that no cut fits
    assert squares(program.shapes(), heads.length) == []


@pytest.mark.parametrize(
    "target, kernel", [("h100_sxm", attend_cudnn), ("a100_sxm_80", attend_cuda)]
)
def test_a_compile_only_gpu_has_its_own_kernel(target: str, kernel: Any) -> None:
    (device,) = h100.devices(1, target)
    assert kernel_for(device, 128, 128) is kernel
    assert kernel_for(device, 128, 128, 512) is attend_part_cuda  # cuDNN takes whole rows


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_attention_in_other_dtypes_fits_the_shared_memory(dtype: str) -> None:
    gradients = jax.grad(_sum_of_squares(attend_cuda, 0.1), (0, 1, 2))
    for target in ("h100_sxm", "a100_sxm_80"):
        lowered = h100.lowered(gradients, *HEADS["V2-Lite"].arrays(target, dtype))
        assert h100.compiled(lowered).kernels() == KERNELS


def test_the_compiler_refuses_a_kernel_that_asks_for_too_much_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_cuda, "_tile", lambda *_: attention_cuda._Tile(256, 128, 8))
    arrays = HEADS["V2-Lite"].arrays("h100_sxm")
    lowered = h100.lowered(lambda *x: attend_cuda(*x, 0.1), *arrays)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        h100.compiled(lowered)


def test_scores_that_are_held_are_found() -> None:
    """The checks above can fail: plain attention of a row of one block has such an array."""
    q, k, v, segment = Heads(1024, 4, 4, 64, 64).arrays("h100_sxm")

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, segment_BT: jax.Array) -> jax.Array:
        tokens = Tokens(jnp.broadcast_to(jnp.arange(1024), segment_BT.shape), segment_BT)
        return dot_product_attention(q, k, v, tokens, tokens, None, 0.1)

    program = h100.compiled(h100.lowered(plain, q, k, v, segment))
    assert squares(program.shapes(), 1024) != []
    assert program.kernels() == {}


def test_experts_multiply_each_row_once() -> None:
    rows, inputs, outputs, experts = 6 * 4096, 2048, 1408, 64
    arrays = (
        _abstract((rows, inputs), jnp.bfloat16, "h100_sxm"),
        _abstract((experts, outputs, inputs), jnp.bfloat16, "h100_sxm"),
        _abstract((experts,), jnp.int32, "h100_sxm"),
    )
    gradients = jax.grad(_sum_of_squares(grouped_matmul), (0, 1))
    program = h100.compiled(h100.lowered(gradients, *arrays))

    assert program.kernels() == {"grouped_matmul": 2, "grouped_weight_gradient": 1}
    assert by_tokens(program.shapes(), rows, rows * inputs + 1) == []
    # The product, its gradient, and the product with its rows beyond all groups set to zero.
    assert program.temporaries < 1.1 * 3 * rows * outputs * 2
