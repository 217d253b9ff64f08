# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of any size, of random numbers, written as a stream.

In: a config.json and a dtype. Out: a Hugging Face directory of safetensors shards; in FP8 where the
config has a quantization_config. Not done here: a tokenizer; measuring.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.models import base_shapes, build, entries_of
from dsjax.models.weight_rules import entry_shape
from dsjax.weights.fp8 import FP8, SCALE, read_format
from dsjax.weights.hf_directory import SAFETENSORS_INDEX, SafetensorsWriter, index_json, shard_names

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
QUANTISED = re.compile(r"_proj(_with_mqa)?\.weight$")
"""What DeepSeek quantises."""

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


def deepseek_v3_config(dtype: str, **sizes: int) -> dict[str, Any]:
    """The config.json of an FP8 checkpoint of V3's kind, of these sizes."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 4096,
        "torch_dtype": dtype,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        **sizes,
    }


Tensors = dict[str, tuple[np.dtype, tuple[int, ...]]]


def tensors_of(config: Mapping[str, Any], dtype: str) -> Tensors:
    """Every tensor of the checkpoint, in the order of the files."""
    model, form = build(config, "float32"), read_format(config)
    shapes = base_shapes(model)
    found: Tensors = {}
    for entry in entries_of(model):
        shape = entry_shape(entry, shapes)
        if form is not None and QUANTISED.search(entry.hf):
            found[entry.hf] = (FP8, shape)
            found[entry.hf + SCALE] = (DTYPES["float32"], form.scale_shape(shape))
        else:
            wide = entry.hf.endswith("e_score_correction_bias")
            found[entry.hf] = (DTYPES["float32" if wide else dtype], shape)
    return found


def nbytes(tensors: Tensors) -> int:
    """Bytes of all these."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], dtype: str, shard_bytes: float = 1e9
) -> int:
    """Write the checkpoint; returns the bytes of its tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = tensors_of(config, dtype)
    sizes = {name: nbytes({name: tensor}) for name, tensor in tensors.items()}
    shards = _shards(sizes, shard_bytes)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(BLOCK, np.float32)
    blocks = {
        kind: (numbers * 0.02).astype(kind) for kind in {kind for kind, _ in tensors.values()}
    }
    blocks[FP8] = numbers.astype(FP8)  # of the size that a scale of 0.02 goes with
    for file, names in files.items():
        entries = [(name, *tensors[name]) for name in names]
        with SafetensorsWriter(directory / file, entries) as writer:
            for name in names:
                kind, shape = tensors[name]
                block = np.full(BLOCK, 0.02, kind) if name.endswith(SCALE) else blocks[kind]
                for rows in _values(shape, block, rng):
                    writer.append(name, rows)
    if len(files) > 1:
        listed = {file: [(name, sizes[name]) for name in names] for file, names in files.items()}
        (directory / SAFETENSORS_INDEX).write_text(index_json(listed))
    return sum(sizes.values())


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
