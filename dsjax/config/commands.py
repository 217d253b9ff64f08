# SPDX-License-Identifier: Apache-2.0
"""The console script: `dsjax train ...` is `python -m dsjax.train ...`, and so are the others.

In: a command and its words. Out: that command's module, run as `python -m` runs it. Not done here:
the commands, none of which is imported before it is asked for.
"""

import runpy
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from dsjax.config.command_line import versions
from dsjax.errors import ConfigError, nearest, run_command
from dsjax.signals import end_at_once

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "train": ("dsjax.train", "train, evaluate, checkpoint, export; the same again resumes"),
        "evaluate": ("dsjax.evaluate", "the loss of a run's newest checkpoint, or of a model"),
        "generate": ("dsjax.generate", "text from a model, with or without an adapter"),
        "export": ("dsjax.export", "merged weights or a PEFT adapter from a run"),
        "plan": ("dsjax.plan", "whether a run fits on devices that are not here"),
        "view": ("dsjax.view", "curves, evaluations and configurations of runs, as one page"),
        "convert": ("dsjax.export.convert", "a checkpoint between Hugging Face's form and dsjax's"),
        "convert-config": ("dsjax.config.convert_config", "a LLaMA-Factory or TRL file to ours"),
    }
)
"""Command -> the module that is run for it, and what it is for."""

_HELP = ("-h", "--help")


def usage() -> str:
    """List the commands."""
    lines = [f"  {name:16}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    more = "dsjax COMMAND --help says more of one; dsjax --version names the versions."
    return "\n".join(["usage: dsjax COMMAND ...", "", *lines, "", more])


def main(argv: Sequence[str]) -> int:
    """Run the command that the first word names.

    Raises:
        ConfigError: there is no such command.
    """
    if not argv or argv[0] in _HELP:
        print(usage())
        return 0
    name = argv[0]
    if name == "--version":
        print(versions())
        return 0
    if name not in COMMANDS:
        raise ConfigError(
            f"command: got {name!r}, expected one of {', '.join(COMMANDS)}; "
            f"{nearest(name, list(COMMANDS))}"
        )
    sys.argv = [name, *argv[1:]]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    return 0


def run() -> None:
    """Run the console script."""
    end_at_once()
    run_command(main)
