# SPDX-License-Identifier: Apache-2.0
"""A run that would work, for each test to spoil."""

from pathlib import Path

import pytest
import tiny
from cli_runner import CliRunner


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A good checkpoint, three shards."""
    return tiny.build_checkpoint(tmp_path_factory.mktemp("bad") / "model", "llama_gqa")


@pytest.fixture
def cli_runner(tmp_path, checkpoint, capsys, monkeypatch) -> CliRunner:
    """The files of a run that would work."""
    return CliRunner(tmp_path, checkpoint, capsys, monkeypatch)
