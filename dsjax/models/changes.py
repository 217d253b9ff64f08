# SPDX-License-Identifier: Apache-2.0
"""How training changes a tensor of the checkpoint, known before anything of it is on the host.

In: arrays on the devices. Out: a `Change`, which gives new values of a few rows at a time. Not done
here: which tensors change (`adapters`, `export.merge`), writing them (`weights.write`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = tuple[slice, ...]


@dataclass(frozen=True)
class Change:
    """New values of some rows of a tensor, float32, from the source's values of those rows.

    Attributes:
        fetch: brings what was trained for these rows to the host; all processes call it alike.
        apply: the new values, from the source's and what was fetched.
    """

    fetch: Callable[[Rows], Any]
    apply: Callable[[np.ndarray, Any], np.ndarray]

    def __call__(self, rows: Rows, source: np.ndarray) -> np.ndarray:
        """Compute the new values."""
        return self.apply(source, self.fetch(rows))


def compose(first: Change, second: Change) -> Change:
    """Two changes of one tensor, one after the other."""
    return Change(
        lambda rows: (first.fetch(rows), second.fetch(rows)),
        lambda source, parts: second.apply(first.apply(source, parts[0]), parts[1]),
    )
