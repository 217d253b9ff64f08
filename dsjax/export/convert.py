# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints between Hugging Face's form and dsjax's, without loss.

    dsjax convert to-flax SRC DST    a Hugging Face directory or hub id -> dsjax
    dsjax convert to-hf SRC DST      back, every tensor byte for byte

In: SRC. Out: DST, a new folder, complete or not at all. Training takes either form as `model.path`.
`python tools/convert_weights.py` is the same. Not done here: the conversions (`weights.convert`).
"""

if __name__ == "__main__":
    from dsjax.signals import end_at_once

    end_at_once()  # what `main` imports takes seconds

import sys
from collections.abc import Sequence

from dsjax.config.command_line import CommandParser, say_start
from dsjax.config.inputs import check_flax_checkpoint, check_model_path
from dsjax.config.stage_clock import import_clock
from dsjax.errors import run_command

VERBS = {"to-flax": "reading weights", "to-hf": "writing weights"}


def main(argv: Sequence[str]) -> int:
    """Run one conversion."""
    parser = CommandParser("dsjax convert", __doc__)
    parser.add_argument("command", choices=VERBS)
    parser.add_argument("src", help="what to convert")
    parser.add_argument("dst", help="folder to write; it must not exist, or be empty")
    words = parser.parse_args(argv)
    check, name = {
        "to-flax": (check_model_path, "model.path"),
        "to-hf": (check_flax_checkpoint, "source"),
    }[words.command]
    check(words.src, name)
    say_start(f"convert {words.command} {words.src}")
    # Imported here: it takes seconds, for which neither the help nor a mistake has to wait.
    with import_clock("jax, flax, orbax, transformers"):
        from dsjax.training.console import Loading
        from dsjax.weights import convert

    run = {"to-flax": convert.to_flax, "to-hf": convert.to_hf}[words.command]
    run(words.src, words.dst, Loading(VERBS[words.command]))
    print(f"wrote {words.dst}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
