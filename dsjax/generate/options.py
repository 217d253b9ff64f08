# SPDX-License-Identifier: Apache-2.0
"""What `dsjax.generate` can be told, without the seconds that its imports take.

In: nothing. Out: the parser of its command line. Not done here: the command (`command`).
"""

from dsjax.config.command_line import CommandParser

USAGE = """Generate: text from a model, with or without an adapter.

    python -m dsjax.generate --model DIR [--adapter DIR] --prompt TEXT [--prompt TEXT ...]
    python -m dsjax.generate --model DIR [--adapter DIR] --chat [--prompt TEXT ...]

`--prompt` is text to go on with; with `--chat` it is what a user says, put through the checkpoint's
chat template, and `--chat` alone is a conversation, line by line from stdin. stdout has the
answers and nothing else.
"""


def make_parser() -> CommandParser:
    """Declare the options; `--help` prints them."""
    parser = CommandParser("python -m dsjax.generate", USAGE)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint: a directory or a hub id")
    add("--adapter", help="PEFT adapter: a directory")
    add("--prompt", action="append", default=[], help="text to go on with; may be repeated")
    add("--chat", action="store_true", help="use the chat template; without --prompt: converse")
    add("--max-new-tokens", type=int, default=512, help="limit of each answer (512)")
    add("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    add("--top-k", type=int, help="draw from the k likeliest tokens")
    add("--top-p", type=float, help="draw from the likeliest tokens that hold this probability")
    add("--seed", type=int, default=0, help="seed of the draws (0)")
    add("--stop", action="append", default=[], help="text that ends an answer; may be repeated")
    add("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    return parser
