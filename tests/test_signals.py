# SPDX-License-Identifier: Apache-2.0
"""Signals at any moment: the right exit code at once, nothing half written, no traceback.

A command notes on stderr that a function begins; the signal comes while that runs.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_run

from dsjax.signals import sent_to

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
NAMES = {signal.SIGINT: "SIGINT (Ctrl-C)", signal.SIGTERM: "SIGTERM"}
SECONDS_TO_END = 30
"""It takes a fraction of one, in the loop two steps and a save; the rest is for a busy machine."""

NOTED = """
import importlib, sys
from dsjax.signals import end_at_once
end_at_once()
command, module, owner, name = sys.argv[1:5]
del sys.argv[1:5]
def note():
    print("AT THE MOMENT", file=sys.stderr, flush=True)
if module:
    place = importlib.import_module(module)
    place = getattr(place, owner) if owner else place
    noted = getattr(place, name)
    setattr(place, name, lambda *args, **options: note() or noted(*args, **options))
else:
    note()
from dsjax import errors
errors.run_command(importlib.import_module(command).main)
"""
"""Runs a command that notes when a function is called, or that it is about to be imported."""

Moment = tuple[str, str, str]
"""A function: its module, its owner in there, its name. Empty for the import of the command."""


def signalled(
    folder: Path, number: signal.Signals, command: str, at: Moment, *words: object, wait: float = 0
) -> str:
    """Send a command a signal during a function; returns what it said, once the code is right."""
    log = folder / "signalled.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", NOTED, command, *at, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ
            | {"PYTHONPATH": f"{small_run.ROOT}:{folder}", "JAX_NUM_CPU_DEVICES": "1"},
            start_new_session=True,
        )
    there = small_run.wait_for(process, lambda: "AT THE MOMENT" in log.read_text())
    assert there, log.read_text()
    time.sleep(wait)
    began = time.monotonic()
    os.killpg(process.pid, number)
    code = process.wait(300)
    said = log.read_text()
    assert code == SIGNALS[number], said[-3000:]
    assert time.monotonic() - began < SECONDS_TO_END
    assert "Traceback" not in said, said[-3000:]
    return said


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_ignored_stays_ignored(number: signal.Signals):
    """A shell's job in the background, nohup, `trap '' INT`."""
    other = next(n for n in SIGNALS if n != number)
    received: list[int] = []
    before = {n: signal.getsignal(n) for n in SIGNALS}
    try:
        signal.signal(number, signal.SIG_IGN)
        with sent_to(received.append), sent_to(received.append):
            for sent in (number, other):
                signal.raise_signal(sent)
        assert received == [other]
        assert signal.getsignal(number) is signal.SIG_IGN
        assert signal.getsignal(other) is before[other]
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_compilation_is_not_waited_for(tmp_path: Path, number: signal.Signals):
    (tmp_path / "compiles.py").write_text("""
import jax
def step(x):
    for _ in range(4000):  # takes about a minute
        x = jax.numpy.sin(x @ x)
    return x
def main(words):
    compile(jax.jit(step).lower(jax.numpy.ones((8, 8))))
    return 0
def compile(lowered):
    lowered.compile()
""")
    said = signalled(tmp_path, number, "compiles", ("compiles", "", "compile"), wait=0.5)
    assert said.endswith(f"ended by {NAMES[number]}\n")


def test_who_waits_for_a_reader_ends_as_well(tmp_path: Path):
    (tmp_path / "writes.py").write_text("""
import sys
def main(words):
    while True:
        print("nobody reads this" * 1000)
""")
    code = "import writes; from dsjax.errors import run_command; run_command(writes.main)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{small_run.ROOT}:{tmp_path}"},
    )
    assert process.stdout is not None and process.stdout.read(1)
    process.terminate()
    assert process.wait(SECONDS_TO_END) == 143
    process.stdout.close()


def test_a_folder_half_written_is_removed(tmp_path: Path):
    (tmp_path / "writes.py").write_text("""
import time
from pathlib import Path
from dsjax.weights.folders import atomic_directory
def main(words):
    with atomic_directory(Path(words[0])) as folder:
        (folder / "half").write_text("")
        half_written()
        time.sleep(600)
def half_written():
    pass
""")
    (tmp_path / "out").mkdir()
    moment = ("writes", "", "half_written")
    signalled(tmp_path, signal.SIGTERM, "writes", moment, tmp_path / "out" / "export")
    assert list((tmp_path / "out").iterdir()) == []


TRAIN: dict[str, Moment] = {
    "import": ("", "", ""),
    "config": ("dsjax.train", "", "load_run"),
    "data": ("dsjax.training.run_data", "", "read_data"),
    "compile": ("dsjax.train", "", "compile_step"),
    "load": ("dsjax.train", "", "load_frozen"),
    "step": ("dsjax.training.loop", "", "to_devices"),
    "restore": ("dsjax.training.checkpoint", "Checkpointer", "restore"),
    "save": ("dsjax.training.checkpoint", "Checkpointer", "save"),
    "evaluate": ("dsjax.training.loop", "", "evaluate_loss"),
    "export": ("dsjax.export.run", "", "write_checkpoint"),
    "proof": ("dsjax.export.verify", "", "prove"),
    "picture": ("dsjax.train", "", "plot_loss"),
}
"""Moments of a run, in the order in which they come if each ends it and it is started again."""


@pytest.mark.slow
def test_a_run_that_is_ended_at_every_moment(tmp_path: Path):
    config = small_run.write_inputs(tmp_path, "lora")
    whole, run = tmp_path / "whole", tmp_path / "run"
    small_run.finish(config, f"output_dir={whole}")
    for place, (name, moment) in enumerate(TRAIN.items()):
        number = list(SIGNALS)[place % 2]
        said = signalled(tmp_path, number, "dsjax.train", moment, "--config", config, wait=0.05)
        in_loop = name in ("step", "save", "evaluate")
        stopping = "; a second Ctrl-C or SIGTERM stops at once" in said
        assert stopping == in_loop, (name, said[-2000:])
        assert (f"to continue: {sys.executable} " in said) == in_loop
        assert [path for path in run.rglob("*") if "partial" in path.name] == [], name
    small_run.finish(config)
    assert small_run.metrics(run) == small_run.metrics(whole)
    assert small_run.contents(run / "export") == small_run.contents(whole / "export")


@pytest.mark.slow
def test_the_other_commands_end_as_well(tmp_path: Path):
    config = small_run.write_inputs(tmp_path, "lora", training={"max_steps": 2, "eval_steps": None})
    small_run.finish(config)
    run, out = tmp_path / "run", tmp_path / "out" / "export"
    out.parent.mkdir()
    evaluate, plan = ("dsjax.evaluate", "", "evaluate_loss"), ("dsjax.plan.plan", "", "_compile")
    export = ("dsjax.export.verify", "", "prove")
    written = ("--run", run, "--out", out, "--format", "merged")
    int_, term = SIGNALS
    for number in (int_, term):
        signalled(tmp_path, number, "dsjax.evaluate", evaluate, "--config", config)
        signalled(tmp_path, number, "dsjax.export.command", export, *written)
        assert list(out.parent.iterdir()) == []
    signalled(tmp_path, term, "dsjax.plan.command", plan, "--config", config, "--topology", "cpu:1")
    load = ("dsjax.generate.command", "", "open_checkpoint")
    words = ("--model", run / "export", "--prompt", "1")
    signalled(tmp_path, int_, "dsjax.generate.command", load, *words)
