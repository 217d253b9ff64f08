# SPDX-License-Identifier: Apache-2.0
"""What the launch files and the documents about them say parses: shells, YAML, dsjax commands.

The scripts' steps run here with stand-ins for the clouds' own commands (gcloud, xpk, mpirun), which
note what they are called with. Whether the clouds would do as they are told is not tested.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from dsjax.config import load_config

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = sorted((ROOT / "launch").iterdir())
DOCUMENTS = [
    ROOT / "docs" / name for name in ("tpu_pods.md", "cuda_clusters.md", "zh-CN/tpu_pods.md")
]
PLACES = {
    **{"$BUCKET": "bucket", "$STORE": "s3://bucket"},
    **{"$MODEL": "model", "$DATA": "rows.jsonl", "$RUN": "runs/x"},
}
POD_FILES = ("launch/tpu_vm.sh", "launch/gke_xpk.sh", "launch/sky_tpu.yaml", "launch/sky_gpu.yaml")
"""Those whose hosts share nothing but a bucket."""
OPTIONS = ("--coordinator", "--processes", "--process", "--topology")


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def shell_parts(file: Path) -> list[str]:
    """What a shell will read of a file."""
    text = file.read_text("utf-8")
    if file.suffix == ".md":
        return re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    if file.suffix == ".yaml":
        task = yaml.safe_load(text)
        return [task["setup"], task["run"]]
    return [text] if file.suffix in (".sh", ".sbatch") else []


def commands(text: str) -> list[list[str]]:
    """The words of every dsjax command: what follows `python -m`."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.split(" -m dsjax.", 1)[1] for line in lines if " -m dsjax." in line]
    return [shlex.split(f"dsjax.{rest}".rstrip("\"'"), comments=True) for rest in found]


@pytest.mark.parametrize("file", [*LAUNCH, *DOCUMENTS], ids=name)
def test_shells_read_it(file: Path) -> None:
    for part in shell_parts(file):
        done = subprocess.run(["bash", "-n"], input=part, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", [file for file in LAUNCH if file.suffix == ".yaml"], ids=name)
def test_sky_tasks_have_what_they_use(file: Path) -> None:
    task = yaml.safe_load(file.read_text("utf-8"))
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"]))
    assert {variable for variable in used if not variable.startswith("SKYPILOT_")} == {
        *task["envs"]
    }
    # SkyPilot refuses to start as long as a null is not given.
    assert set(task["envs"].values()) == {None}
    assert task["resources"]["accelerators"] and task["workdir"] == "."


@pytest.mark.parametrize("file", [*LAUNCH, *DOCUMENTS], ids=name)
def test_dsjax_commands_parse(file: Path) -> None:
    for part in shell_parts(file):
        for module, *words in commands(part):
            assert find_spec(module) is not None
            assert words[0] == "--config"
            overrides = [word for word in without_options(words[2:]) if "=" in word]
            for place, value in PLACES.items():
                overrides = [word.replace(place, value) for word in overrides]
            assert not any("$" in word for word in overrides)
            config = load_config(ROOT / words[1], overrides)
            if name(file) in POD_FILES:
                places = [config.model.path, *config.data.train, config.output_dir]
                assert [p for p in places if not p.startswith(("gs://", "s3://"))] == []


def without_options(words: list[str]) -> list[str]:
    """The overrides of a command; its options are known."""
    rest = iter(words)
    kept = []
    for word in rest:
        if word.startswith("--"):
            assert word in OPTIONS
            next(rest)
        else:
            kept.append(word)
    return kept


def test_every_launch_file_runs_a_command_and_is_described() -> None:
    documents = "".join(file.read_text("utf-8") for file in DOCUMENTS)
    for file in LAUNCH:
        if file.name != "Dockerfile":
            assert sum(len(commands(part)) for part in shell_parts(file)) == 1, file
            assert name(file) in documents


def test_the_image_has_what_it_copies() -> None:
    text = (ROOT / "launch" / "Dockerfile").read_text("utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)


STAND_IN = """#!/bin/bash
printf '%s\\037' "${0##*/}" "$@" >>"$CALLS/calls"; printf '\\036' >>"$CALLS/calls"
for word in "$@"; do
  case "$word" in *.env | --env-file=*) cp -p "${word#*=}" "$CALLS/secret" ;; esac
done
case "${0##*/} $*" in
  systemctl*) exit "${SERVICE:-3}" ;;
  *"queued-resources list"*) head -n 1 "$CALLS/states"; sed -i 1d "$CALLS/states" ;;
esac
"""
"""Notes its words, keeps a file of secrets, and answers as the service or the queue would."""

Calls = list[list[str]]


@pytest.fixture
def launched(tmp_path: Path) -> Callable[..., tuple[int, Calls]]:
    """Run words of a shell where the clouds' commands are stand-ins; returns code and calls."""
    names = ("gcloud", "xpk", "mpirun", "git", "sleep", "sudo", "systemctl")
    for command in names:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / command).write_text(STAND_IN)
        (tmp_path / "bin" / command).chmod(0o755)

    def launch(*words: str, states: tuple[str, ...] = (), **given: str) -> tuple[int, Calls]:
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        (tmp_path / "calls").write_text("")
        variables = {
            **{"PROJECT": "p", "ZONE": "z", "BUCKET": "b", "IMAGE": "i"},
            **{"CALLS": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        }
        base = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
        done = subprocess.run(words, cwd=ROOT, env=base | variables | given)
        calls = (tmp_path / "calls").read_text().split("\36")[:-1]
        return done.returncode, [call.split("\37")[:-1] for call in calls]

    return launch


def steps(calls: Calls) -> list[str]:
    """What each call does: `gcloud compute tpus queued-resources create ...` creates."""
    known = "list create delete scp ssh sleep".split()
    return [next(word for word in call if word in known) for call in calls if "archive" not in call]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        # Nothing there; it takes a while.
        (
            ["", "", "PROVISIONING", "PROVISIONING", "ACTIVE"],
            "list list create list list sleep list",
        ),
        # A slice that was taken away.
        (["SUSPENDED", "", "ACTIVE"], "list delete list create list"),
        # All is there already.
        (["ACTIVE"] * 3, "list list list"),
    ],
)
def test_one_command_starts_and_starts_again(launched, states, expected) -> None:
    code, calls = launched("bash", "launch/tpu_vm.sh", "up", states=states)
    assert (code, steps(calls)) == (0, [*expected.split(), "scp", "ssh", "ssh"])
    places = {"--project=p", "--zone=z"}
    assert all(places <= set(call) for call in calls if call[0] == "gcloud")


def test_a_slice_that_is_not_granted_ends_the_wait(launched) -> None:
    states = ["", "", "CREATING", "CREATING", "FAILED", "FAILED"]
    code, calls = launched("bash", "launch/tpu_vm.sh", "up", states=states)
    assert code == 1 and "ssh" not in steps(calls)


@pytest.mark.parametrize("token", ["hf_secret", ""])
@pytest.mark.parametrize("words", ["tpu_vm.sh setup", "gke_xpk.sh start"])
def test_the_token_is_passed_on_and_stands_in_no_command(launched, tmp_path, words, token) -> None:
    script, step = words.split()
    given = {"HF_TOKEN": token} if token else {}
    code, calls = launched("bash", f"launch/{script}", step, **given)
    assert code == 0 and "hf_secret" not in str(calls)
    passed = tmp_path / "secret"
    assert passed.read_text() == (f"HF_TOKEN={token}\n" if token else "\n")
    assert passed.stat().st_mode & 0o077 == 0
    files = [word for call in calls for word in call if re.search(r"\.env$|^--env-file=", word)]
    assert files and not any(Path(file.rpartition("=")[2]).exists() for file in files)


def test_open_mpi_passes_the_token_on(launched) -> None:
    places = {"HOSTS": "a,b", "MODEL": "m", "DATA": "d", "RUN": "r"}
    for given, found in (({}, False), ({"HF_TOKEN": "hf_secret"}, True)):
        _, ((*words,),) = launched("bash", "launch/openmpi.sh", **places, **given)
        assert ("HF_TOKEN" in words, "hf_secret" in str(words)) == (found, False)
        assert words[words.index("-np") + 1] == "2"


def test_a_host_that_trains_is_left_alone(launched) -> None:
    _, ((*_, asked),) = launched("bash", "launch/tpu_vm.sh", "start")
    on_host = asked.removeprefix("--command=")
    _, calls = launched("bash", "-c", on_host, USER="me", HOME="/home/me", SERVICE="3")
    assert [call[0] for call in calls] == ["systemctl", "sudo"]
    assert {"--uid=me", "--property=EnvironmentFile=/home/me/dsjax.env"} <= set(calls[1])
    assert calls[1][-3:] == [
        *("model.path=gs://b/DeepSeek-R1", "data.train=gs://b/train.jsonl"),
        "output_dir=gs://b/runs/r1",
    ]
    _, calls = launched("bash", "-c", on_host, USER="me", HOME="/home/me", SERVICE="0")
    assert [call[0] for call in calls] == ["systemctl"]


def test_a_stopped_or_preempted_jobset_is_started_again(launched) -> None:
    _, ((*words,),) = launched("bash", "launch/gke_xpk.sh", "start")
    assert {"--max-restarts=50", "--termination-grace-period-seconds=600"} <= set(words)
    assert not any(word.startswith("--storage") for word in words)
