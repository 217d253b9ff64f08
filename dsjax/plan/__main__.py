# SPDX-License-Identifier: Apache-2.0
"""python -m dsjax.plan."""

from dsjax.signals import end_at_once

end_at_once()  # what is imported below takes seconds

import os  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from dsjax.config.stage_clock import import_clock  # noqa: E402
from dsjax.errors import run_command  # noqa: E402
from dsjax.plan.options import answered  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Print the help, or name a mistake, before the imports that take seconds; then the command."""
    if answered(argv):
        return 0
    # What is compiled for devices that are not here cannot be read from a cache: jax would warn.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    with import_clock("jax, flax, optax"):
        from dsjax.plan.command import main as command

    return command(argv)


if __name__ == "__main__":
    run_command(main)
