# SPDX-License-Identifier: Apache-2.0
"""No command says nothing for more than 2 s: its stderr, read with a clock.

A silence counts by the clock or by the processor, whichever is less: on a quiet machine work of 2 s
takes 2 s of both, and where other tests take the cores the clock goes on and the processor's time
does not. So what only waits (for a disk, for another process) is not seen here. The commands' own
clock, which in logs becomes slower the longer a stage takes, goes every second here: what is tested
is that there is one beside each stage.
"""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import small_run

pytestmark = pytest.mark.slow

MOST = 2.0
COMMAND = """
import runpy, sys
from dsjax.config import stage_clock
stage_clock.PAUSES = (1.0,)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Silence(NamedTuple):
    """What a command took to say the next thing, in seconds; `after` is what it had said."""

    seconds: float
    after: str


def silences(module: str, *words: str, terminal: bool = False) -> list[Silence]:
    """Run a command that must succeed; return its silences, up to its last words."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, module, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "TERM": "xterm"},
        cwd=small_run.ROOT,
    )
    os.close(theirs)
    found, said, at = [], "the start", (time.monotonic(), 0.0)
    while said:
        before, earlier = said, at
        said = read(ours)
        at = time.monotonic(), processor_seconds(process.pid)
        found.append(Silence(min(b - a for a, b in zip(earlier, at, strict=True)), before))
    os.close(ours)
    assert process.wait() == 0, before
    return found[:-1]  # after its last words the interpreter ends


def read(file: int) -> str:
    """Wait for what is said; nothing at the end."""
    try:
        return os.read(file, 65536).decode(errors="replace")
    except OSError:  # a terminal that nobody writes to any more
        return ""


def processor_seconds(pid: int) -> float:
    """What a process, all of its threads, has taken of the processors; also where it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def too_long(found: list[Silence]) -> list[Silence]:
    return [silence for silence in found if silence.seconds > MOST]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_inputs(tmp_path_factory.mktemp("silent"), "lora")


def test_a_run_into_a_log(config: Path):
    found = silences("dsjax.train", str(config))
    assert too_long(found) == []
    assert any("importing" in silence.after for silence in found)


def test_a_dry_run_on_a_terminal(config: Path):
    found = silences("dsjax.train", str(config), "--dry-run", terminal=True)
    assert too_long(found) == []
    assert any("importing" in silence.after for silence in found)


def test_an_answer(config: Path):
    words = ("--model", str(config.parent / "model"), "--prompt", "x", "--max-new-tokens", "4")
    assert too_long(silences("dsjax.generate", *words)) == []
