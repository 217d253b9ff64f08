# SPDX-License-Identifier: Apache-2.0
"""What tests do to a run that has been trained: leave it unfinished, spoil it, have it refused.

In: a copy of the run of conftest.py. Out: the copy as a kill would have left it, or a message.
Not here: the run itself (tests/small_run.py).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsjax.config import CheckpointSection
from dsjax.errors import ConfigError
from dsjax.training.checkpoint import Checkpointer

TOTAL = 12
LOSS_BOUND = 1e-5  # relative; float32 sums in another order on another mesh


def refused(again: Callable[..., str], *overrides: str) -> str:
    """Run the command, which must refuse; return its message."""
    with pytest.raises(ConfigError) as error:
        again(*overrides)
    return str(error.value)


def unfinish(run: Path) -> None:
    """Leave a run as a kill after step 10 would have."""
    for name in ("export", f"checkpoints/{TOTAL}"):
        shutil.rmtree(run / name)
    for name in ("training_loss.png", "eval_results.json"):
        (run / name).unlink()


def restored_meta(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says of the run."""
    reader = Checkpointer(run / "checkpoints", CheckpointSection(), read_only=True)
    step = reader.latest()
    assert step is not None
    meta = reader.meta(step)
    reader.close()
    return meta
