# SPDX-License-Identifier: Apache-2.0
"""What an opened checkpoint can do, whatever form it lies in.

Implemented by `hf_directory.HFSource`, `dsjax_format.FlaxSource` and `fp8.DequantisedSource`. And
a digest that tells one checkpoint from another, wherever and in whichever of these forms it lies.
"""

import hashlib
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsjax.weights.safetensors import TensorInfo
from dsjax.weights.storage import in_order


@runtime_checkable
class Source(Protocol):
    """An opened checkpoint (`hf_directory`, `dsjax_format`)."""

    @property
    def directory(self) -> Path:
        """Where its small files lie on this machine: config, tokenizer, templates."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        ...

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the order of the files."""
        ...

    @property
    def reads_ahead(self) -> int:
        """How many reads are worth having under way at a time."""
        ...

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read a tensor or a part of it."""
        ...

    def aux_files(self) -> list[Path]:
        """List the files to keep beside the weights."""
        ...

    def file_headers(self) -> dict[str, bytes]:
        """Return the safetensors headers, empty for `.bin` files."""
        ...

    def index_text(self) -> str | None:
        """Return the index file, None if there is none."""
        ...


MOST_SAMPLES, SAMPLE_BYTES = 512, 1 << 16
_SAYS_NOTHING = ("_name_or_path", "transformers_version")
"""Fields of config.json that change when it is saved again."""


def source_digest(source: Source) -> str:
    """Digest a checkpoint's contents: its config, its tensors, their numbers.

    Of the numbers a sample is read, so that it takes seconds for the largest checkpoint and behind
    a URL: up to 64 KB from each of up to 512 tensors, chosen by their names' hashes, which follow
    no pattern of layers. A small tensor is read whole. (Arrays on devices are compared whole: see
    `training.restore.check_frozen`.)
    """
    config = {k: v for k, v in source.config.items() if k not in _SAYS_NOTHING}
    tensors = {name: [str(i.dtype), i.shape] for name, i in source.tensors.items()}
    whole = hashlib.blake2b(json.dumps([config, tensors], sort_keys=True).encode(), digest_size=8)
    chosen = sorted(tensors, key=_hashed)[:MOST_SAMPLES]
    for part in in_order([partial(_sample, source, name) for name in chosen], source.reads_ahead):
        whole.update(part.tobytes())
    return whole.hexdigest()


def _sample(source: Source, name: str) -> np.ndarray:
    """Read some rows of a tensor, which ones its name says."""
    info = source.tensors[name]
    if not info.shape or info.nbytes <= SAMPLE_BYTES:
        return source.read(name)
    row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
    count = max(1, SAMPLE_BYTES // max(1, row_bytes))
    first = int.from_bytes(_hashed(name), "little") % max(1, info.shape[0] - count)
    return source.read(name, (slice(first, first + count),))


def _hashed(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def copy_aux_files(source: Source, directory: Path) -> None:
    """Copy the files that belong beside the weights; one of a sub-folder into the same one."""
    for file in source.aux_files():
        copy = directory / file.relative_to(source.directory)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
