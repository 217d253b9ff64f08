# SPDX-License-Identifier: Apache-2.0
"""Convert a configuration of LLaMA-Factory or TRL to ours.

    dsjax convert-config FILE.yaml --devices N [--dataset-info FILE.json] > ours.yaml

In: their YAML, the number of devices that it was for (GPUs, divided by the size of tensor or
sequence parallelism), and for LLaMA-Factory its dataset_info.json (the one in the file's
dataset_dir, if not given). Out: our YAML on stdout; its first lines, and
stderr, say what is not the same. `python tools/convert_config.py` is the same. Not done here: the
conversion (`other_trainers`).
"""

import sys
from collections.abc import Sequence

from dsjax.config.command_line import CommandParser, print_text
from dsjax.config.other_trainers.conversion import as_text, convert_file
from dsjax.errors import ConfigError, run_command


def main(argv: Sequence[str]) -> int:
    """Convert one file."""
    parser = CommandParser("dsjax convert-config", __doc__)
    parser.add_argument("file", help="their YAML")
    parser.add_argument("--devices", type=int, help="how many devices took rows of their own")
    parser.add_argument("--dataset-info", help="LLaMA-Factory's description of its data sets")
    words = parser.parse_args(argv)
    if words.devices is not None and words.devices < 1:
        raise ConfigError(f"--devices: got {words.devices}, expected an integer >= 1; count GPUs")
    done = convert_file(words.file, words.devices, words.dataset_info)
    print_text(as_text(done, words.file, words.devices).rstrip())
    count = f"{len(done.differs)} not the same here, {len(done.nothing)} with nothing to set"
    print(f"{words.file}: a file of {done.trainer}; keys: {count}", file=sys.stderr)
    for line in done.differs:
        print(f"not the same: {line}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
