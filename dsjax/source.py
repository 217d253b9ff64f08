# SPDX-License-Identifier: Apache-2.0
"""What an opened checkpoint can do, whatever form it lies in.

Implemented by `hf_files.HFSource`, `flax_checkpoint.FlaxSource` and `fp8.DequantisedSource`.
"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsjax.safetensors_file import TensorInfo


@runtime_checkable
class Source(Protocol):
    """An opened checkpoint (`hf_files`, `flax_checkpoint`)."""

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
        """The files to keep beside the weights."""
        ...

    def file_headers(self) -> dict[str, bytes]:
        """The safetensors headers, empty for `.bin` files."""
        ...

    def index_text(self) -> str | None:
        """The index file, None if there is none."""
        ...
