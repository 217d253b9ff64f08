# SPDX-License-Identifier: Apache-2.0
"""Plan: whether a run fits on devices that are not here, by their own compiler.

    python -m dsjax.plan --config FILE --topology v5p:2x4x4 [section.key=value ...]

--config FILE      the run's configuration; of the model its config.json is enough, of data nothing
--topology NAME    v5p:2x4x4 (also v4, v5e, v6e), h100:8, h200:8x4 (also a100, l40s), cpu:8
--json             print the plan as JSON on stdout, and nothing else there
--verbose          also list every array: shape, sharding, bytes on a device
--search           find the largest batch and the cheapest remat policy that fit
--suggest          find the smallest slice that fits, and a mesh; --topology v5p looks among v5p
                   (none: v5e, v6e, v5p), several hosts of GPUs are not tried
--help             print this, and stop

Calls the stages that training calls, on abstract arrays, and compiles the step. Not fitting is an
answer (exit 0, `fits` false). Not done here: the compilers' devices (`topologies`), the estimate
of time (`roofline`), trying variants (`search`).
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from dsjax.config import load_config, split_arguments
from dsjax.errors import ConfigError
from dsjax.plan import report, search
from dsjax.plan.plan import make_plan
from dsjax.plan.topologies import open_topology

COMPILE_ONLY = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Else libtpu looks for the machine's TPU, and complains of what it does not find.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What lets the plug-ins be loaded without their devices, and by several processes at once."""

_SWITCHES = ("--json", "--verbose", "--search", "--suggest")
_OPTIONS = ("--config", "--topology", *_SWITCHES, "--help", "-h")


def main(argv: Sequence[str]) -> int:
    """Print what was asked for."""
    os.environ |= COMPILE_ONLY | dict(os.environ)
    switches, topology, rest = _own_words(argv)
    path, overrides, wanted = split_arguments(rest)
    if "--help" in wanted:
        print(__doc__)
        return 0
    config = load_config(path, overrides)
    if topology is None and "--suggest" not in switches:
        raise ConfigError("--topology: got nothing, expected one such as v5p:2x4x4 or h100:8")
    if "--suggest" in switches:
        found: Any = search.suggest(config, topology, _say)
        lines = report.suggestion_lines(found)
    elif "--search" in switches:
        found = search.search(config, open_topology(topology or ""), _say)
        lines = report.search_lines(found)
    else:
        found = make_plan(config, open_topology(topology or ""))
        lines = report.plan_lines(found, "--verbose" in switches)
    if "--json" in switches:
        print(json.dumps(_plain(found), indent=2))
    else:
        print("\n".join(lines))
    return 0


def _own_words(argv: Sequence[str]) -> tuple[set[str], str | None, list[str]]:
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
            raise ConfigError(
                f"{name}: got an unknown option, expected one of {', '.join(_OPTIONS[:-1])}; every "
                "other setting is a bare section.key=value"
            )
        else:
            rest.append(word)
    if len(topologies) > 1:
        raise ConfigError(f"--topology: got {' and '.join(topologies)}, expected one")
    if {"--search", "--suggest"} <= switches:
        raise ConfigError("--search: got it beside --suggest, expected one of the two")
    if "--verbose" in switches and {"--search", "--suggest"} & switches:
        raise ConfigError("--verbose: got it beside a search, expected it of one plan alone")
    return switches, topologies[0] if topologies else None, rest


def _plain(found: Any) -> Any:
    """Return what JSON can say: plans as objects, lists as lists."""
    if isinstance(found, list):
        return [_plain(item) for item in found]
    return dataclasses.asdict(found)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
