# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as DeepSeek ships V3: block-wise FP8, and modules for multi-token prediction.

In: a folder that transformers saved. Out: the same with what transformers cannot save, and, to
compare with, a plain copy whose numbers this file computed. transformers' own dequantiser is not a
reference: it guesses the size of a block, wrongly where blocks are cut. Not here: dsjax.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
LARGEST = 448.0

_QUANTISED = re.compile(
    r"(q|q_a|q_b|kv_b|o|gate|up|down)_proj\.weight|kv_a_proj_with_mqa\.weight"
    r"|indexer\.(wq_b|wk)\.weight"
)


def add_prediction_modules(directory: Path, first: int, count: int, seed: int = 11) -> None:
    """Add `model.layers.<first>.*` and on: a block like the last, with copies of both ends."""
    generator = torch.Generator().manual_seed(seed)
    last, added = f"model.layers.{first - 1}.", {}
    everything = _read(directory)
    embedding = everything["model.embed_tokens.weight"]
    hidden = embedding.shape[1]
    for number in range(first, first + count):
        prefix = f"model.layers.{number}."
        shapes = {
            prefix + name.removeprefix(last): (tensor.shape, tensor.dtype)
            for name, tensor in everything.items()
            if name.startswith(last)
        }
        for name in ("enorm", "hnorm", "shared_head.norm"):
            shapes[f"{prefix}{name}.weight"] = ((hidden,), embedding.dtype)
        shapes[f"{prefix}eh_proj.weight"] = ((hidden, 2 * hidden), embedding.dtype)
        added |= {
            # Norms near 1; smaller than 1 by 1, or the router's scores would all be exactly 1.
            name: (0.15 * torch.randn(shape, generator=generator) + ("norm" in name)).to(dtype)
            for name, (shape, dtype) in shapes.items()
        }
        head = everything.get("lm_head.weight", embedding)
        for name, tensor in (("embed_tokens", embedding), ("shared_head.head", head)):
            added[f"{prefix}{name}.weight"] = tensor.clone()
    newest = max(directory.glob("*.safetensors"))
    _rewrite(directory, lambda path, tensors: tensors | added if path == newest else tensors)


def quantise_folder(directory: Path, block: tuple[int, int], power_of_two: bool) -> None:
    """Turn the matrices that DeepSeek quantises into FP8 and scales, and say so in config.json."""

    def quantise_file(_: Path, tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            if _QUANTISED.fullmatch(_end(name)):
                found[name], found[name + SCALE] = quantise(tensor, block, power_of_two)
            else:
                found[name] = tensor
        return found

    _rewrite(directory, quantise_file)
    config = json.loads((directory / "config.json").read_text())
    section = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    config["quantization_config"] = section | ({"scale_fmt": "ue8m0"} if power_of_two else {})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _end(name: str) -> str:
    """The last two or three components: the module, with `indexer` before it, and `weight`."""
    parts = name.split(".")
    return ".".join(parts[-3:] if "indexer" in parts else parts[-2:])


def quantise(
    values: torch.Tensor, block: tuple[int, int], power_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes and scales of a matrix, one block after the other."""
    values = values.float()
    counts = [math.ceil(size / step) for size, step in zip(values.shape, block, strict=True)]
    scaled, scales = torch.empty_like(values), torch.empty(counts)
    for row in range(counts[0]):
        for column in range(counts[1]):
            part = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scale = values[part].abs().max() / LARGEST
            if power_of_two:
                scale = 2.0 ** torch.ceil(torch.log2(scale))
            scales[row, column] = scale
            scaled[part] = values[part] / scale
    return scaled.to(torch.float8_e4m3fn), scales


def dequantise(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The numbers, float32, that bytes and scales stand for."""
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * wide[: weight.shape[0], : weight.shape[1]]


@contextmanager
def readable_by_torch(directory: str | Path) -> Iterator[Path]:
    """A folder with the same numbers without FP8: the folder itself, or a copy while it is used."""
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    section = config.pop("quantization_config", None)
    if section is None:
        yield directory
        return
    block = section["weight_block_size"]
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for path in directory.iterdir():
            if path.suffix != ".safetensors" and path.name != INDEX:
                shutil.copyfile(path, copy / path.name)
        (copy / "config.json").write_text(json.dumps(config))
        found = _read(directory)
        tensors = {}
        for name, tensor in found.items():
            scales = found.get(name + SCALE)
            if not name.endswith(SCALE):
                tensors[name] = tensor if scales is None else dequantise(tensor, scales, block)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        yield copy


def _read(directory: Path) -> Tensors:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _rewrite(directory: Path, change: Callable[[Path, Tensors], Tensors]) -> None:
    """Change the tensors of every file, and the index with them."""
    weight_map, total = {}, 0
    for path in sorted(directory.glob("*.safetensors")):
        tensors = change(path, load_file(path))
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sorted(tensors), path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = directory / INDEX
    if index.exists():
        content = json.loads(index.read_text())
        content["metadata"]["total_size"] = total
        content["weight_map"] = weight_map
        index.write_text(json.dumps(content, indent=2) + "\n")
