# SPDX-License-Identifier: Apache-2.0
"""What `dsjax.train` answers before its imports, which take seconds.

In: the words of its command line. Out: its usage with every key, the schema of its file, the
mistakes of its configuration. Not done here: reading one (`load`), what the options of several
processes mean (`distributed.bootstrap`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from dsjax.config.command_line import print_text, say_start, versions
from dsjax.config.inputs import check_inputs
from dsjax.config.load import describe, json_schema, load_config, load_run, recipes, to_yaml
from dsjax.config.yaml_file import split_arguments

USAGE = """usage: python -m dsjax.train FILE.yaml [section.key=value ...]

FILE.yaml         the sections below; words `section.key=value` override it
--config FILE     the same, for a file whose name ends otherwise
--dry-run         check everything, announce the run, compile it, and stop: no weights are
                  loaded (a model of the hub is downloaded), nothing is written
--fresh           a new run in a new folder, NAME-2 or NAME-3, if output_dir NAME exists
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


PROCESS_OPTIONS = ("--coordinator", "--processes", "--process", "--wait")

_OF_LAUNCHERS = re.compile(
    "(SLURM|OMPI|PMI|PMIX|MV2|JSM|FLUX|LWS|MEGASCALE|SKYPILOT|KUBERNETES|JOB|TPU_WORKER|TPU_PROCESS)_"
    "|(WORLD_SIZE|JAX_COORDINATOR_ADDRESS|JAX_NUM_PROCESSES|NUM_PROCESSES)$"
)
"""Variables that launchers set, most of them also for a process alone."""


def split_process_options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Take the options of several processes out of a command line: (given options, other words)."""
    given: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in PROCESS_OPTIONS:
            given[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    return given, rest


def answered(argv: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Print the text that is asked for; False if there is a run to begin, which it then says.

    Raises:
        ConfigError: an option is wrong; or the configuration, where no other process could wait
            for this one. Else it is read once all are there, and each hears what is wrong.
    """
    given, words = split_process_options(argv)
    if "--help" in words or "-h" in words:
        print_text(f"{USAGE}Recipes to begin with: {recipes()}/*.yaml\n\n{describe()}")
    elif "--version" in words:
        print_text(versions())
    elif "--schema" in words:
        print_text(json.dumps(json_schema(), indent=2))
    else:
        path, overrides, wanted = split_arguments(words)
        if "--print-config" in wanted:
            print_text(to_yaml(load_config(path, overrides)).rstrip())
            return True
        if path is None or not (given or may_be_several(environment)):
            check_inputs(load_run(path, overrides))
        say_start(f"train {path}")
        return False
    return True


def may_be_several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher, or a TPU, may have started other processes of this run.

    It says yes too often: to be sure takes jax (`distributed.launchers`), whose import takes
    seconds.
    """
    on_tpu = environment.get("JAX_PLATFORMS") != "cpu" and find_spec("libtpu") is not None
    return on_tpu or any(_OF_LAUNCHERS.match(name) for name in environment)
