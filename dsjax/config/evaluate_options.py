# SPDX-License-Identifier: Apache-2.0
"""What `dsjax.evaluate` can be told, and what it answers before its imports, which take seconds.

In: the words of its command line. Out: their parser, its help, their mistakes. Not done here: the
command (`evaluate`).
"""

import argparse
from collections.abc import Sequence
from typing import get_args

from dsjax.config.command_line import CommandParser, say_start
from dsjax.config.inputs import check_inputs, check_named
from dsjax.config.load import load_config
from dsjax.config.sections import DataSection
from dsjax.config.yaml_file import is_config_file, one_config
from dsjax.errors import raise_all

USAGE = """Evaluate: the loss of a model over files, exact to the token, as JSON on stdout.

    python -m dsjax.evaluate FILE.yaml [section.key=value ...]
    python -m dsjax.evaluate --model DIR [--adapter DIR] --data FILE [--data FILE ...]

With FILE.yaml (or --config FILE): data.eval, with the newest checkpoint of the run in output_dir
if it has one, else with the model as configured; stderr says which.
"""

OPTIONS = {
    "model.path": "--model",
    "model.dtype": "--dtype",
    "adapter.path": "--adapter",
    "data.eval": "--data",
    "data.format": "--format",
    "data.max_length": "--max-length",
    "training.batch_size": "--batch-size",
}
"""Key of a configuration -> the option that stands for it where there is no configuration."""


def make_parser() -> CommandParser:
    """Declare the options; `--help` prints them."""
    parser = CommandParser("python -m dsjax.evaluate", USAGE)
    formats = get_args(DataSection.model_fields["format"].annotation)
    add = parser.add_argument
    add("--config", help="configuration of a run (YAML), if its name ends otherwise")
    add("overrides", nargs="*", help="FILE.yaml, and section.key=value for it")
    add("--model", help="checkpoint: a directory or a hub id")
    add("--adapter", help="PEFT adapter: a directory")
    add("--data", action="append", help="file or hub dataset; may be repeated")
    add("--format", choices=formats, help="what a row looks like (auto)")
    add("--max-length", type=int, help="longer rows are cut, and counted (2048)")
    add("--batch-size", type=int, help="rows at a time, over all devices (8)")
    add("--dtype", choices=("bfloat16", "float32", "float16"), help="of the computation (bfloat16)")
    return parser


def parse_words(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; the configuration may stand among its bare words.

    Raises:
        ConfigError: an option is wrong, or there are two configurations.
    """
    words = make_parser().parse_intermixed_args(argv)
    files = [word for word in words.overrides if is_config_file(word)]
    words.config = one_config([word for word in (words.config, *files) if word is not None])
    words.overrides = [word for word in words.overrides if word not in files]
    return words


def answered(argv: Sequence[str]) -> bool:
    """Print the help that is asked for; False if there is something to evaluate, which it says.

    Raises:
        ConfigError: an option is wrong, or the configuration.
    """
    if "--help" in argv or "-h" in argv:
        make_parser().print_help()
        return True
    words = parse_words(argv)
    raise_all(word_problems(words))
    if words.config is not None:
        check_inputs(load_config(words.config, words.overrides), training=False)
    elif words.model is not None:
        names = ("--model", "--adapter")
        check_named(words.model, words.adapter, {"--data": words.data or []}, names)
    say_start(f"evaluate {words.config or words.model or ''}".rstrip())
    return False


def word_problems(words: argparse.Namespace) -> list[str]:
    """Return a line for every option that is missing, wrong, or at odds with another."""
    if words.config is not None:
        keys = {option: key for key, option in OPTIONS.items()}
        given = [option for option in keys if vars(words)[option[2:].replace("-", "_")] is not None]
        return [
            f"{option}: got it beside {words.config}, expected one of the two; "
            f"beside a configuration write {keys[option]}=..."
            for option in given
        ]
    problems = []
    if not words.model:
        problems.append("--model: got nothing, expected a checkpoint; or FILE.yaml of a run")
    if not words.data or "" in words.data:
        problems.append("--data: got nothing, expected at least one file or hub dataset")
    for word in words.overrides:
        problems.append(f"{word}: got an override without FILE.yaml, expected options")
    for option, value, least in (
        ("--max-length", words.max_length, 2),
        ("--batch-size", words.batch_size, 1),
    ):
        if value is not None and value < least:
            problems.append(f"{option}: got {value}, expected an integer >= {least}")
    return problems
