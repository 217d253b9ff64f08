# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints from one form to the other: Hugging Face's and dsjax's own.

In: a directory or hub id, and the directory to make. Out: the same weights in the other form, with
everything else that the source holds, so that the way back gives the same bytes. Not done here: how
either form lies on disk (`hf_directory`, `dsjax_format`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from dsjax.config.inputs import check_flax_checkpoint
from dsjax.distributed.sharding import Leaf
from dsjax.models import Model, build, entries_of
from dsjax.models.weight_rules import Entry
from dsjax.weights import dsjax_format, fp8, hf_directory
from dsjax.weights.dsjax_format import open_flax
from dsjax.weights.folders import (
    atomic_directory,
    check_apart,
    check_empty,
    check_room,
    leftovers_of,
)
from dsjax.weights.load import check_config, check_coverage, load_entries
from dsjax.weights.source import Source
from dsjax.weights.write import write_checkpoint


def to_flax(src: str, dst: str, progress: Callable[[int, int], None] = lambda done, total: None):
    """Convert a Hugging Face checkpoint into a dsjax checkpoint.

    Args:
        src: directory or hub id.
        dst: directory to make; it must not exist, or be empty.
        progress: told the bytes read so far and in all.

    Raises:
        ConfigError: the source is wrong or not supported, or `dst` is in use.
    """
    check_empty(dst)
    check_apart(dst, "output directory", {"source": src})
    source = hf_directory.open_source(src, check=check_config)
    model = build(source.config, "float32")
    check_coverage(fp8.dequantised(source), model)
    entries = _stored_entries(source, model)
    arrays = {entry.hf for entry in entries}
    carried = [name for name in source.tensors if name not in arrays]
    leaves = _leaves_as_stored(source, entries)
    device = SingleDeviceSharding(jax.devices()[0])
    shardings = dict.fromkeys(leaves, device)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    check_room(Path(dst), {"the checkpoint": size}, "output directory", leftovers_of(Path(dst)))
    params = load_entries(source, entries, leaves, shardings, progress)
    with atomic_directory(Path(dst), check=lambda: check_empty(dst)) as directory:
        dsjax_format.save_flax(source, directory, entries, params, carried)


def _stored_entries(source: Source, model: Model) -> list[Entry]:
    """Return what a dsjax checkpoint holds as arrays: the model's tensors, FP8 scales apart."""
    entries = entries_of(model)
    scales = [
        replace(entry, hf=entry.hf + fp8.SCALE, path=entry.path + fp8.SCALE)
        for entry in entries
        if source.tensors[entry.hf].dtype == fp8.FP8
    ]
    return entries + scales


def _leaves_as_stored(source: Source, entries: Sequence[Entry]) -> dict[str, Leaf]:
    """Plan arrays that hold these tensors exactly; a stack has room for every index up to its last.

    Scales may be there for a part of a stack only.
    """
    by_path: dict[str, list[Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry)
    leaves = {}
    for path, own in by_path.items():
        infos = [source.tensors[entry.hf] for entry in own]
        lead = tuple(np.max([entry.index for entry in own], axis=0).astype(int) + 1)
        shape = (*map(int, lead), *infos[0].shape)
        dtype = dsjax_format.exact_dtype([info.dtype for info in infos])
        leaves[path] = Leaf(shape, (None,) * len(shape), dtype, "base", math.prod(shape))
    return leaves


def to_hf(
    src: str, dst: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Turn a dsjax checkpoint back into the Hugging Face checkpoint that it was made from."""
    check_flax_checkpoint(src, "source")
    check_empty(dst)
    check_apart(dst, "output directory", {"source": src})
    source = open_flax(src)
    with atomic_directory(Path(dst), check=lambda: check_empty(dst)) as directory:
        write_checkpoint(source, directory, {}, progress)
