# SPDX-License-Identifier: Apache-2.0
"""Mistakes on a command line read like all others: one line that names the option, exit 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsjax.config.command_line import CommandParser
from dsjax.errors import ConfigError

CONVERT = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"


def _parser() -> CommandParser:
    parser = CommandParser("command", "What it does.\n\n    as it is written")
    parser.add_argument("--run", required=True)
    parser.add_argument("--format", choices=("merged", "peft"))
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--chat", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--run: got nothing, expected a value"]),
        (["--run"], ["--run: got nothing, expected a value"]),
        (["--run", "x", "--format", "gguf"], ["--format: got 'gguf', expected ", "merged", "peft"]),
        (["--run", "x", "--top-k", "many"], ["--top-k: got 'many', expected an integer"]),
        (["--run", "x", "--top-p", "most"], ["--top-p: got 'most', expected a number"]),
        (["--run", "x", "--fromat", "peft"], ["--fromat: got an option", "mean --format"]),
        (["--run", "x", "--for", "peft"], ["--for: got an option", "--format"]),
        (["--run", "x", "there"], ["there: got unrecognized arguments", "expected none"]),
        (["--run", "x", "--chat=yes"], ["--chat: got 'yes', expected no value"]),
    ],
)
def test_a_mistake_names_the_option(words: list[str], parts: list[str]):
    with pytest.raises(ConfigError) as refused:
        _parser().parse_args(words)
    assert "\n" not in str(refused.value)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_help_is_shown_as_it_is_written(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(["--help"])
    assert end.value.code == 0
    assert "\n    as it is written\n" in capsys.readouterr().out


def test_a_conversion_that_does_not_exist():
    command = [sys.executable, str(CONVERT), "to-gguf", "a", "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: command: got 'to-gguf', expected ")
    assert "to-flax" in done.stderr and "usage" not in done.stderr


WITHOUT_TORCH = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
blind = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
PathFinder.find_spec = blind
"""
WARNED = """
import runpy, sys
from importlib.util import find_spec

assert find_spec("torch") is None
runpy.run_module(sys.argv.pop(1), run_name="imported")
from transformers.utils import logging

logging.get_logger("transformers").warning("something else of transformers")
"""


@pytest.mark.parametrize("module", ["dsjax.train", "dsjax.generate"])
def test_without_torch_no_command_begins_with_a_warning(module: str, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    # Where CI is set, transformers hands its messages to the root logger as well.
    settings = {
        name: value
        for name, value in os.environ.items()
        if "TRANSFORMERS" not in name and name != "CI"
    }
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(CONVERT.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", WARNED, module],
        env=settings,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "[transformers] something else of transformers\n"
