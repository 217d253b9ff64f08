# SPDX-License-Identifier: Apache-2.0
"""What `dsjax.train` prints about itself, without the seconds that its imports take.

In: the words of its command line. Out: its usage with every key, or the schema of its file. Not
done here: reading a configuration (`load`), what the options mean (`distributed.bootstrap`).
"""

import json
from collections.abc import Sequence

from dsjax.config.command_line import print_text, versions
from dsjax.config.load import describe, json_schema, recipes

USAGE = """usage: python -m dsjax.train FILE.yaml [section.key=value ...]

FILE.yaml         the sections below; words `section.key=value` override it
--config FILE     the same, for a file whose name ends otherwise
--print-config    print the resolved configuration, and stop
--schema          print its JSON schema, for editors, and stop
--version         print the versions of dsjax and of what it stands on, and stop
--help            print this, and stop

Several processes find each other by what a TPU VM, GKE, Slurm or Open MPI tells them, or by
--coordinator HOST:PORT  where process 0 listens
--processes N            how many there are; 1 alone is a run of this process, whatever started it
--process I              which one this is, from 0
--wait SECONDS           how long to wait for the others (45)

"""


def show_text(argv: Sequence[str]) -> bool:
    """Print what `--help`, `-h`, `--version` or `--schema` asks for; False if none is there."""
    if "--help" in argv or "-h" in argv:
        print_text(f"{USAGE}Recipes to begin with: {recipes()}/*.yaml\n\n{describe()}")
        return True
    if "--version" in argv:
        print_text(versions())
        return True
    if "--schema" in argv:
        print_text(json.dumps(json_schema(), indent=2))
        return True
    return False
