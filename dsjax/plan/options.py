# SPDX-License-Identifier: Apache-2.0
"""What `dsjax.plan` can be told, and what it answers before its imports, which take seconds.

In: the words of its command line. Out: its usage, their mistakes, or the words by what they are.
Not done here: the command (`command`), `--config` with overrides (`config.yaml_file`).
"""

from collections.abc import Sequence

from dsjax.config.command_line import print_text, say_start
from dsjax.config.load import load_config
from dsjax.config.yaml_file import split_arguments, unknown_option
from dsjax.errors import ConfigError

USAGE = """Plan: whether a run fits on devices that are not here, by their own compiler.

    python -m dsjax.plan FILE.yaml --topology v5p:2x4x4 [section.key=value ...]

FILE.yaml          the run's configuration (--config FILE, if its name ends otherwise); of the model
                   its config.json is enough, of data nothing
--topology NAME    v5p:2x4x4 (also v4, v5e, v6e), h100:8, h200:8x4 (also a100, l4, l40s), cpu:8
--json             print the plan as JSON on stdout, and nothing else there
--verbose          also list every array: shape, sharding, bytes on a device
--search           find the largest batch and the cheapest remat policy that fit
--suggest          find the smallest slice that fits, and a mesh; --topology v5p looks among v5p
                   (none: v5e, v6e, v5p), several hosts of GPUs are not tried
--help             print this, and stop

Calls the stages that training calls, on abstract arrays, and compiles the step. Not fitting is an
answer (exit 0, `fits` false).
"""

_SWITCHES = ("--json", "--verbose", "--search", "--suggest")
_OPTIONS = ("--config", "--topology", *_SWITCHES, "--help", "-h")


def answered(argv: Sequence[str]) -> bool:
    """Print the help that is asked for; False if there is something to plan, which it says.

    Raises:
        ConfigError: an option is wrong, or the configuration.
    """
    if "--help" in argv or "-h" in argv:
        print_text(USAGE)
        return True
    path, overrides, _ = split_arguments(split_words(argv)[2])
    load_config(path, overrides)
    say_start(f"plan {path}")
    return False


def split_words(argv: Sequence[str]) -> tuple[set[str], str | None, list[str]]:
    """Take this command's options out of its words."""
    switches, topologies, rest = set(), [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--topology":
            topologies.append(value if equals else next(words, ""))
        elif word in _SWITCHES:
            switches.add(word)
        elif word.startswith("-") and name not in _OPTIONS:
            raise unknown_option(name, _OPTIONS[:-1])
        else:
            rest.append(word)
    if len(topologies) > 1:
        raise ConfigError(f"--topology: got {' and '.join(topologies)}, expected one")
    if {"--search", "--suggest"} <= switches:
        raise ConfigError("--search: got it beside --suggest, expected one of the two")
    if "--verbose" in switches and {"--search", "--suggest"} & switches:
        raise ConfigError("--verbose: got it beside a search, expected it of one plan alone")
    return switches, topologies[0] if topologies else None, rest
