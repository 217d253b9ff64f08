# SPDX-License-Identifier: Apache-2.0
"""Command lines whose mistakes read like every other mistake of a user's.

In: the options of a command. Out: its parsed words, or a ConfigError that names the option; texts
printed. Not done here: `--config` with overrides (`yaml_file`), what the values mean.
"""

import argparse
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

import dsjax
from dsjax.errors import ConfigError, nearest


class CommandParser(argparse.ArgumentParser):
    """argparse's parser; options are written out, and mistakes are ConfigErrors."""

    def __init__(self, prog: str, description: str | None):
        """Make a parser; `--help` shows the description as it is written."""
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def print_help(self, file: Any = None) -> None:
        """Print the description and the options."""
        print_text(self.format_help().rstrip())

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Name an option that is not known before one that is missing, for which it may stand."""
        for word in args or ():
            if word == "--":
                break
            option = word.partition("=")[0]
            if word.startswith("--") and " " not in option and option not in self._options():
                self.error(f"unrecognized arguments: {option}")
        return super().parse_known_args(args, namespace)

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Tell of a mistake in the words of `errors`.

        Raises:
            ConfigError: always.
        """
        for pattern, told in _MISTAKES:
            found = re.fullmatch(pattern, message, re.DOTALL)
            if found:
                line = found.expand(told)
                break
        else:
            line = f"command line: got {message}, expected the usage that --help shows"
        unknown = re.match(r"(--?\S+): got an option that", line)
        hint = nearest(unknown[1], self._options()) if unknown else "--help lists all options"
        raise ConfigError(f"{line}; {hint}")


def print_text(text: str) -> None:
    """Print, also for a reader that leaves before the end, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end


def say_start(what: str) -> None:
    """Say on stderr that a command has begun, before its imports, which take seconds."""
    print(f"dsjax {dsjax.__version__}: {what}", file=sys.stderr, flush=True)


def versions() -> str:
    """Name the versions that a report of a fault needs; nothing is imported for it."""
    installed = ", ".join(f"{name} {version(name)}" for name in _STANDS_ON)
    return f"dsjax {dsjax.__version__} (Python {platform.python_version()}, {installed})"


_STANDS_ON = ("jax", "jaxlib", "flax", "optax", "transformers")

_MISTAKES: Sequence[tuple[str, str]] = (
    (r"the following arguments are required: (.*)", r"\1: got nothing, expected a value"),
    (r"unrecognized arguments: (-\S+).*", r"\1: got an option that is not known, expected another"),
    (r"unrecognized arguments: (.*)", r"\1: got unrecognized arguments, expected none"),
    (r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", r"\1: got \2, expected \3"),
    (r"argument (\S+): invalid int value: (.*)", r"\1: got \2, expected an integer"),
    (r"argument (\S+): invalid float value: (.*)", r"\1: got \2, expected a number"),
    (r"argument (\S+): expected one argument", r"\1: got nothing, expected a value"),
    (r"argument (\S+): ignored explicit argument (.*)", r"\1: got \2, expected no value"),
)
"""What argparse says -> what we say."""
