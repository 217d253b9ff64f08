# SPDX-License-Identifier: Apache-2.0
"""python -m dsjax.generate."""

from dsjax.signals import end_at_once

end_at_once()  # what is imported below takes seconds

from collections.abc import Sequence  # noqa: E402

from dsjax.config.command_line import say_start  # noqa: E402
from dsjax.config.inputs import check_named  # noqa: E402
from dsjax.config.stage_clock import import_clock  # noqa: E402
from dsjax.errors import run_command  # noqa: E402
from dsjax.generate.options import make_parser  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Print the help, or name a mistake, before the imports that take seconds; then the command."""
    words = make_parser().parse_args(argv)
    check_named(words.model, words.adapter, {}, ("--model", "--adapter"))
    say_start(f"generate {words.model}")
    with import_clock("jax, flax, transformers"):
        from dsjax.generate.command import main as command

    return command(argv)


if __name__ == "__main__":
    run_command(main)
