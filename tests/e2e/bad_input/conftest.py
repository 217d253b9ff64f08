# SPDX-License-Identifier: Apache-2.0
"""A run that would work, for each test to spoil."""

from pathlib import Path

import pytest
import tiny
from desk import Desk


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A good checkpoint, three shards."""
    return tiny.build_checkpoint(tmp_path_factory.mktemp("bad") / "model", "llama_gqa")


@pytest.fixture
def desk(tmp_path, checkpoint, capsys, monkeypatch) -> Desk:
    """The files of a run that would work."""
    return Desk(tmp_path, checkpoint, capsys, monkeypatch)
