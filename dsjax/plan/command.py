# SPDX-License-Identifier: Apache-2.0
"""Plan: the command that asks the compilers of devices that are not here.

In: the words of its command line (`options`). Out: a plan, or several, as text or JSON on stdout.
Calls the stages that training calls, on abstract arrays, and compiles the step. Not done here: the
compilers' devices (`topologies`), the estimate of time (`roofline`), trying variants (`search`).
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
from dsjax.plan.options import split_words
from dsjax.plan.plan import make_plan
from dsjax.plan.topologies import open_topology
from dsjax.training.console import working

COMPILE_ONLY = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Else libtpu looks for the machine's TPU, and complains of what it does not find.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What lets the plug-ins be loaded without their devices, and by several processes at once."""


def main(argv: Sequence[str]) -> int:
    """Print the plan that is asked for."""
    os.environ |= COMPILE_ONLY | dict(os.environ)
    switches, topology, rest = split_words(argv)
    path, overrides, _ = split_arguments(rest)
    config = load_config(path, overrides)
    if topology is None and "--suggest" not in switches:
        raise ConfigError("--topology: got nothing, expected one such as v5p:2x4x4 or h100:8")
    with working("planning: the compiler is at work", at_once=False):
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


def _plain(found: Any) -> Any:
    """Return what JSON can say: plans as objects, lists as lists."""
    if isinstance(found, list):
        return [_plain(item) for item in found]
    return dataclasses.asdict(found)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
