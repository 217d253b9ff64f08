# SPDX-License-Identifier: Apache-2.0
"""The console script runs the modules, and says what it knows without importing them."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dsjax.config.commands import COMMANDS, main
from dsjax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"jax", "flax", "transformers", "orbax", "torch", "datasets"}
RUN = "import sys\nfrom dsjax.config.commands import main\nsys.exit(main(sys.argv[1:]))"


def dsjax(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_the_commands_are_listed(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match=r"command: got 'trian', expected .*mean train\?$"):
        main(["trian", "--config", "run.yaml"])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_exit_code_is_the_command_s(name: str):
    done = dsjax(name, "--no-such-option")
    assert done.returncode == 2 and done.stderr.startswith("error: ")


TEXTS = [
    "--help",
    "--version",
    *(f"{name} --help" for name in COMMANDS),
    "train -h",
    "plan -h",
    "train --schema",
    "train --version",
]


def run_light(words: str, **environment: str) -> tuple[int, str, str, set[str]]:
    """Exit code, both outputs, and which libraries that take seconds were imported for them."""
    code = (
        "import sys\nfrom dsjax.config.commands import main\n"
        f"try: main({words.split()})\n"
        f"finally: print(*{HEAVY} & set(sys.modules), sep=',', file=open(3, 'w'))"
    )
    read, write = os.pipe()
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" 3>&{write}', sys.executable, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        pass_fds=[write],
        env=os.environ | environment,
    )
    os.close(write)
    with open(read) as imported:
        return (
            done.returncode,
            done.stdout,
            done.stderr,
            set(imported.read().strip().split(",")) - {""},
        )


@pytest.mark.parametrize("words", TEXTS)
def test_a_text_is_there_at_once(words: str):
    """None of the libraries is imported for it that take seconds."""
    code, shown, complaint, imported = run_light(words)
    assert (code, complaint, imported) == (0, "", set()) and shown


MISTAKES = {
    "train none.yaml": "none.yaml: got No such file",
    "train configs/quickstart.yaml training.batch_sise=1": "training.batch_sise: got an unknown",
    "train configs/quickstart.yaml training.batch_size=0": "training.batch_size: got 0",
    "train --schem": "--schem: got an unknown option",
    "evaluate none.yaml": "none.yaml: got No such file",
    "evaluate none": "--model: got nothing, expected a checkpoint",
    "evaluate configs/quickstart.yaml data.val_size=x": "data.val_size: got",
    "plan none.yaml --topology cpu:8": "none.yaml: got No such file",
    "plan configs/quickstart.yaml --topolgy cpu:8": "--topolgy: got an unknown option",
    "train configs/quickstart.yaml model.path=no/such/place": "model.path: got 'no/such/place'",
    "train configs/quickstart.yaml model.path=tests data.train=x.jsonl": "data.train[0]: got x.js",
    "evaluate --model no/such/place --data x.jsonl": "--model: got 'no/such/place', expected",
    "evaluate configs/quickstart.yaml model.path=tests data.eval=x.csv": "data.eval[0]: got x.csv",
    "export --run tests --out x --format peft": "--run: got 'tests', expected the output_dir of",
    "generate --model no/such/place": "--model: got 'no/such/place', expected",
    "generate --model tests --adapter no/one": "--adapter: got 'no/one', expected a PEFT adapter's",
    "evaluate --model tests --data x.jsonl": "--data[0]: got x.jsonl, expected a file that exists",
    "export --rum x": "--rum: got",
    "generate --promt x": "--promt: got",
    "view none": "RUN: got 'none', expected the output_dir of a run",
    "view configs --no-brwser": "--no-brwser: got an option that is not known",
    "convert to-flax no/such/place x": "model.path: got 'no/such/place', expected a directory or",
    "convert to-hf tests x": "source: got 'tests', expected a directory written by to-flax",
    "convert-config none.yaml": "none.yaml: got No such file",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_named_at_once(words: str):
    code, shown, complaint, imported = run_light(words)
    assert (code, shown, imported) == (2, "", set())
    assert complaint.startswith(f"error: {MISTAKES[words]}")


def test_where_others_may_wait_a_wrong_configuration_is_told_to_all():
    """So not before they are met, for which jax is needed."""
    code, _, complaint, imported = run_light("train none.yaml", SLURM_JOB_ID="1")
    assert code == 2 and "jax" in imported
    began, *_, told = complaint.splitlines()  # between them, the clock of the imports
    assert began.endswith(": train none.yaml") and told.startswith("error: none.yaml: got No")


def test_the_version_names_what_a_report_needs():
    shown = dsjax("--version").stdout
    assert shown.startswith(f"dsjax {version('dsjax')} (Python {platform.python_version()}, jax ")
    assert shown.endswith(f", transformers {version('transformers')})\n")


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(module, marks=[] if name == "train" else pytest.mark.slow)
        for name, (module, _) in COMMANDS.items()
    ],
)
def test_help_takes_a_few_times_what_its_two_libraries_take(module: str):
    """Of a processor: a tenth of a second each on a quiet machine, so that it is below 0.7 s there.

    The machine that tests run on may be half as fast a minute later: both are measured in turn.
    """
    libraries = [sys.executable, "-c", "import pydantic, yaml"]
    shown = [sys.executable, "-m", module, "--help"]
    pairs = [(_seconds(shown), _seconds(libraries)) for _ in range(3)]
    assert min(whole / alone for whole, alone in pairs) < 5


def _seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("words", [words for words in TEXTS if " " in words])
def test_a_reader_may_leave_before_the_end(words: str):
    name, option = words.split()
    command = [sys.executable, "-m", COMMANDS[name][0], option]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b"" and run.wait() == 0
