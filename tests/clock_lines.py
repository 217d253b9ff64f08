# SPDX-License-Identifier: Apache-2.0
"""What a command says on stderr without its clocks, whose lines come or not by the load."""

import re

LINE = re.compile(r".* \(\d+:\d\d:\d\d\)\n?")
"""A line of `dsjax.config.stage_clock`: what is done, and for how long by now."""


def without_clocks(stderr: str) -> str:
    """Leave out the lines of clocks; every other line stays as it is."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not LINE.fullmatch(line))
