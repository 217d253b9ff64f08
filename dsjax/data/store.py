# SPDX-License-Identifier: Apache-2.0
"""Tokenised examples in a temporary file, so that host memory does not grow with the data.

In: examples, one after the other. Out: any example by its index, read by several threads at once.
The file has no name (it is unlinked as soon as it is made), so nothing is left behind, even by a
killed run; it lies where `tempfile` puts it (`TMPDIR`) and takes 12 bytes a token.
Not here: what becomes an example (`examples`), who reads it when (`loader`).
"""

import hashlib
import os
import tempfile
import weakref
from array import array
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from dsjax.errors import files_of

_PLACE = "the folder for temporary files (TMPDIR)"


class Example(NamedTuple):
    """One tokenised row; `labels[t]` and `loss_weights[t]` belong to token t itself, unshifted."""

    input_ids: Int32[np.ndarray, " T"]
    labels: Int32[np.ndarray, " T"]
    loss_weights: Float32[np.ndarray, " T"]

    def trained(self) -> int:
        """Count the tokens that are predicted and weigh something; the first is never predicted."""
        return int(np.count_nonzero(self.loss_weights[1:]))

    def cut(self, length: int) -> "Example":
        """Return the first `length` tokens."""
        return Example(*(field[:length] for field in self))


class ExampleStore:
    """Examples in an unnamed file: append all of them, `finalize`, then read by index."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="dsjax-examples-")
        weakref.finalize(self, self._file.close)
        self._sizes = array("q")
        self._digest = hashlib.blake2b(digest_size=16)
        self.lengths: Int64[np.ndarray, " N"] = np.zeros(0, np.int64)
        self._starts: Int64[np.ndarray, " N"] = np.zeros(0, np.int64)

    def append(self, example: Example) -> None:
        """Write one example at the end."""
        self._digest.update(len(example.input_ids).to_bytes(8, "little"))
        with files_of(_PLACE):
            for field in example:
                content = field.tobytes()
                self._digest.update(content)
                self._file.write(content)
        self._sizes.append(len(example.input_ids))

    def finalize(self) -> None:
        """Finish writing; from here on the examples can be read."""
        with files_of(_PLACE):
            self._file.flush()
        self.lengths = np.array(self._sizes, np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths

    @property
    def fingerprint(self) -> str:
        """Tells other examples, or another order of them, from these."""
        return f"{len(self)} examples, blake2b {self._digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        length = int(self.lengths[index])
        # pread, not a memory map: mapped pages would count as this process's memory.
        raw = os.pread(self._file.fileno(), 12 * length, 12 * int(self._starts[index]))
        ids, labels, weights = np.frombuffer(raw, np.int32).reshape(3, length)
        return Example(ids, labels, weights.view(np.float32))
