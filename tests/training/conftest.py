# SPDX-License-Identifier: Apache-2.0
"""Checkpointers of one directory, closed at the end of a test."""

import pytest
from checkpoint_states import EVERY

from dsjax.training.checkpoint import Checkpointer


@pytest.fixture
def open_in(tmp_path):
    """Open Checkpointers in one directory; close them all at the end."""
    opened = []

    def open_one(section=EVERY, **options):
        opened.append(Checkpointer(tmp_path / "checkpoints", section, **options))
        return opened[-1]

    yield open_one
    for checkpointer in opened:
        checkpointer.close()
