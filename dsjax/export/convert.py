# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints between Hugging Face's form and dsjax's, without loss.

    dsjax convert to-flax SRC DST    a Hugging Face directory or hub id -> dsjax
    dsjax convert to-hf SRC DST      back, every tensor byte for byte

In: SRC. Out: DST, a new folder, complete or not at all. Training takes either form as `model.path`.
`python tools/convert_weights.py` is the same. Not done here: the conversions (`weights.convert`).
"""

if __name__ == "__main__":
    from dsjax.signals import end_at_once

    end_at_once()  # what is imported below takes seconds

import sys
from collections.abc import Sequence

from dsjax.config.command_line import CommandParser
from dsjax.errors import run_command
from dsjax.training.console import Loading
from dsjax.weights.convert import to_flax, to_hf

COMMANDS = {"to-flax": (to_flax, "reading weights"), "to-hf": (to_hf, "writing weights")}


def main(argv: Sequence[str]) -> int:
    """Run one conversion."""
    parser = CommandParser("dsjax convert", __doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("src", help="what to convert")
    parser.add_argument("dst", help="folder to write; it must not exist, or be empty")
    words = parser.parse_args(argv)
    convert, verb = COMMANDS[words.command]
    convert(words.src, words.dst, Loading(verb))
    print(f"wrote {words.dst}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
