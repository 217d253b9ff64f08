# SPDX-License-Identifier: Apache-2.0
"""What `dsjax.export` can be told, without the seconds that its imports take.

In: nothing. Out: the parser of its command line. Not done here: the command (`command`).
"""

from dsjax.config.command_line import CommandParser


def make_parser() -> CommandParser:
    """Declare the options; `--help` prints them."""
    parser = CommandParser(
        "python -m dsjax.export", "Export the newest checkpoint of a run, finished or not."
    )
    parser.add_argument("--run", required=True, help="output_dir of a run")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="of the run's configuration: model.path=DIR, where its model lies elsewhere by now",
    )
    parser.add_argument("--format", required=True, choices=("merged", "peft"))
    return parser
