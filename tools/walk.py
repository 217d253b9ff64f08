# SPDX-License-Identifier: Apache-2.0
"""Walk README.md and README.zh-CN.md as a reader does, on a CPU, from a bare clone.

    make walk, or: python tools/walk.py [--folder DIR]

In: the two pages of the last commit. Every block of them is taken in its order: commands are run in
a clone, in an environment that they install themselves; YAML becomes the file that later commands
name; output has to be what was printed, up to its figures, and where those are others that is said
at the end: they are of one kind of machine. Out: what each took, and exit code 1 if one failed, if
an entry of the tables below matches nothing, or if a block is of no kind that is known. The files
and the model of a reader are those that `make quickstart` leaves behind. A command of the second
page that was run for the first is not run again. Not here: `docs/`, whose commands tests read.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README.zh-CN.md")
MODEL = "runs/quickstart/pretrain/export"
HUB_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
OWN_ROWS = ("YOUR.jsonl", "train.jsonl", "held_out.jsonl")
"""Files of a reader's own: the quickstart's questions stand for them."""

NOT_RUN: Mapping[str, str] = {
    "from transformers import AutoModelForCausalLM": "needs torch, which dsjax does not install; "
    "tests/e2e/test_quickstart.py loads such exports by transformers and PEFT",
}
"""First line of a block, or a command -> why it is not run here."""

IN_PLACE: Mapping[str, tuple[str, str]] = {
    ".venv/bin/dsjax train configs/r1_distill_qwen_7b_lora.yaml data.train=YOUR.jsonl": (
        ".venv/bin/dsjax train configs/r1_distill_qwen_7b_lora.yaml data.train=YOUR.jsonl "
        f"model.path={MODEL} data.max_length=256 training.max_steps=2",
        "a model of 7 billion parameters from the hub; the quickstart's, for two steps",
    ),
    "pip install -e '.[tpu]'": (
        "pip install --dry-run -e '.[tpu]'",
        "the machine has no TPU; resolved only",
    ),
    "pip install -e '.[cuda]'": (
        "pip install --dry-run -e '.[cuda]'",
        "the machine has no GPU; resolved only",
    ),
    "pip install -e '.[cuda12]'": (
        "pip install --dry-run -e '.[cuda12]'",
        "the machine has no GPU; resolved only",
    ),
    "python -m dsjax.generate --model runs/mine/export --chat": (
        "echo 'Where does Ana live?' | python -m dsjax.generate --model runs/mine/export --chat",
        "somebody types",
    ),
}
"""A command -> what is run in its place, and why."""

BEFORE = "import numpy\ninput_ids = numpy.array([[1, 2, 3]])\n"
"""What the examples in Python take as given."""


class Step(NamedTuple):
    """What one block, or one command of it, asks of a reader.

    Attributes:
        kind: bash, python, yaml, or output.
        shown: the page's text, without comments.
        run: what is run; None: nothing is.
        why: why it is not what is shown; empty where it is.
    """

    kind: str
    shown: str
    run: str | None
    why: str = ""


def main(words: Sequence[str]) -> int:
    """Walk both pages; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run every block of the READMEs in a bare clone.")
    parser.add_argument("--folder", help="where to (default: a temporary one, removed at the end)")
    folder = parser.parse_args(words).folder
    pages = {name: steps((ROOT / name).read_text("utf-8")) for name in PAGES}
    wrong = unmatched([step for page in pages.values() for step in page])
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    place = Path(folder or tempfile.mkdtemp(prefix="walk-"))
    place.mkdir(parents=True, exist_ok=True)
    try:
        return Walk(place).through(pages)
    finally:
        if folder is None:
            shutil.rmtree(place)


def steps(page: str) -> list[Step]:
    """Read what a page asks of its reader, in its order.

    Raises:
        ValueError: a block is of no kind that is known.
    """
    found = []
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S):
        if language not in ("bash", "python", "yaml", ""):
            raise ValueError(f"a block is {language!r}, which nothing here knows how to walk")
        code = re.sub(r"(^|[ \t]+)# .*$", "", code, flags=re.M)
        if language == "bash":
            commands = code.replace("\\\n", " ").splitlines()
            found += [_step("bash", " ".join(line.split())) for line in commands if line.strip()]
        else:
            found.append(_step(language or "output", code.strip()))
    return found


def _step(kind: str, shown: str) -> Step:
    first = shown.partition("\n")[0]
    if first in NOT_RUN:
        return Step(kind, shown, None, NOT_RUN[first])
    if first in IN_PLACE:
        return Step(kind, shown, *IN_PLACE[first])
    if HUB_MODEL in shown:
        return Step(kind, shown, shown.replace(HUB_MODEL, MODEL), "the quickstart's model")
    return Step(kind, shown, shown)


def unmatched(walked: Sequence[Step]) -> list[str]:
    """Return a line for every entry of the tables that stands for nothing on the pages."""
    first = {step.shown.partition("\n")[0] for step in walked}
    return [
        f"nothing shows this any more: {key}" for key in (*NOT_RUN, *IN_PLACE) if key not in first
    ]


class Walk:
    """One reader, in one folder: what was run so far, and what it printed."""

    def __init__(self, folder: Path) -> None:
        """Begin where a reader does, who has nothing yet."""
        self._at = folder
        self._printed: list[str] = []
        self._done: set[str] = set()
        self._failed: list[str] = []
        self._differing: list[str] = []
        # The environment of whoever runs this is not the reader's.
        ours = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "EXTRAS")
        self._environment = {k: v for k, v in os.environ.items() if k not in ours}
        self._environment["JAX_PLATFORMS"] = "cpu"

    def through(self, pages: Mapping[str, Sequence[Step]]) -> int:
        """Take every step; returns the exit code."""
        lines = [line for name, page in pages.items() for line in self._page(name, page)]
        size = sum(file.lstat().st_size for file in (self._at / ".venv").rglob("*"))
        print("\n==== the walk", *lines, f".venv is {size / 2**30:.2f} GiB", sep="\n")
        print(*self._failed or ["every block was walked"], *self._differing, sep="\n", flush=True)
        return 1 if self._failed else 0

    def _page(self, name: str, page: Sequence[Step]) -> Iterator[str]:
        for step in page:
            if step.shown in self._done:
                yield f"{name}: as before: {_first(step.shown)}"
            elif step.run is None:
                yield f"{name}: not run: {_first(step.shown)} ({step.why})"
            else:
                began = time.monotonic()
                if step.kind == "output":
                    self._compare(name, step.shown)
                elif not self._take(step):
                    self._failed.append(f"{name}: failed: {step.run}")
                why = f" (in its place, {step.why}: {_first(step.run)})" if step.why else ""
                yield f"{name}: {time.monotonic() - began:6.1f} s  {_first(step.shown)}{why}"
            self._done.add(step.shown)

    def _compare(self, name: str, shown: str) -> None:
        """Look for what a page shows among what was printed; its figures may be others, loudly."""
        found = [
            line for line in self._printed if _without_figures(line) == _without_figures(shown)
        ]
        if not found:
            self._failed.append(f"{name}: failed: {shown}")
        elif shown not in found:
            self._differing.append(f"OTHER FIGURES, {name}: {shown!r} was here {found[-1]!r}")

    def _take(self, step: Step) -> bool:
        """Do what a step asks; returns whether it went well."""
        assert step.run is not None
        if step.kind == "yaml":
            (self._at / "mine.yaml").write_text(step.run, "utf-8")
            return True
        if step.kind == "python":
            (self._at / "example.py").write_text(BEFORE + step.run, "utf-8")
            return self._run("python example.py")
        if step.run.startswith("git clone "):
            return self._clone(step.run)
        done = self._run(step.run)
        if step.run == "make quickstart":
            for name in OWN_ROWS:
                shutil.copy(self._at / "runs/quickstart/data/questions.jsonl", self._at / name)
        return done

    def _clone(self, command: str) -> bool:
        """Clone this checkout in place of the public address, and go where the reader goes."""
        clone, _, folder = command.partition(" && cd ")
        address = clone.split()[2]
        done = self._run(clone.replace(address, str(ROOT)))
        self._at /= folder
        # What the reader has in front are the commands of the clone's environment.
        path = f"{self._at / '.venv/bin'}:{self._environment['PATH']}"
        self._environment["PATH"] = path
        return done

    def _run(self, command: str) -> bool:
        """Run a command, and show what it prints as it comes."""
        print(f"\n$ {command}", flush=True)
        with subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=self._at,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                self._printed.append(line.rstrip("\n"))
        return process.returncode == 0


def _without_figures(line: str) -> str:
    """Return a line with its numbers left open: a training's differ between processors."""
    return re.sub(r"\d+(\.\d+)?", "N", line)


def _first(text: str) -> str:
    return text.partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
