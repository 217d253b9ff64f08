# SPDX-License-Identifier: Apache-2.0
"""A Llama-shaped checkpoint of any size, of random numbers, written as a stream.

In: a config.json's fields and a dtype. Out: a Hugging Face directory of safetensors shards. Not
done here: a tokenizer; measuring.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.hf_files import SAFETENSORS_INDEX, SafetensorsWriter, index_json, shard_names

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
BLOCK = 2**24
"""Random numbers that are made; tensors are cut from them at random places."""


def llama_config(dtype: str, **sizes: int | bool) -> dict[str, Any]:
    """The config.json of a llama of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
        "transformers_version": "4.33.1",
        **sizes,
    }


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order of the files."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv = hidden // heads * kv_heads
    layer = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, ffn),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": s for name, s in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], dtype: str, shard_bytes: float = 1e9
) -> int:
    """Write the checkpoint; returns the bytes of its tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shapes, size = tensor_shapes(config), DTYPES[dtype].itemsize
    shards = _shards({name: math.prod(s) * size for name, s in shapes.items()}, shard_bytes)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(BLOCK, np.float32) * 0.02).astype(DTYPES[dtype])
    for file, names in files.items():
        entries = [(name, DTYPES[dtype], shapes[name]) for name in names]
        with SafetensorsWriter(directory / file, entries) as writer:
            for name in names:
                for rows in _values(shapes[name], block, rng):
                    writer.append(name, rows)
    sizes = {f: [(n, math.prod(shapes[n]) * size) for n in names] for f, names in files.items()}
    if len(files) > 1:
        (directory / SAFETENSORS_INDEX).write_text(index_json(sizes))
    return sum(size for tensors in sizes.values() for _, size in tensors)


def _shards(sizes: Mapping[str, int], most: float) -> list[list[str]]:
    """Fill shards in order, as transformers does."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _values(
    shape: tuple[int, ...], block: np.ndarray, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Rows of a tensor, a few at a time; a norm is one."""
    if len(shape) == 1:
        yield np.ones(shape, block.dtype)
        return
    step = max(1, min(shape[0], BLOCK // 2 // shape[1]))
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        place = rng.integers(0, BLOCK - rows * shape[1] + 1)
        yield block[place : place + rows * shape[1]].reshape(rows, shape[1])
