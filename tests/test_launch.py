# SPDX-License-Identifier: Apache-2.0
"""What the launch files and the documents about them say parses: shells, YAML, dsjax commands."""

import re
import shlex
import subprocess
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
PLACES = {"$BUCKET": "bucket", "$MODEL": "model", "$DATA": "rows.jsonl", "$RUN": "runs/x"}
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
            assert load_config(ROOT / words[1], overrides)


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
