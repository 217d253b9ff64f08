# SPDX-License-Identifier: Apache-2.0
"""One run, trained once in a process of its own on one device, and copies of it to begin again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import small_run

from dsjax import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a finished run, in the folder `run` beside it."""
    config = small_run.write_inputs(tmp_path_factory.mktemp("resume"), "lora")
    small_run.finish(config)
    return config


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished.parent / "run", tmp_path / "run")


@pytest.fixture
def again(finished: Path, run: Path, capsys) -> Callable[..., str]:
    """Run the same command on the copy, with overrides; return what it said on stderr."""

    def call(*overrides: str) -> str:
        words = ["--config", str(finished), f"output_dir={run}", *overrides]
        assert train.main(words) == 0
        return capsys.readouterr().err

    return call
