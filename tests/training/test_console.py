# SPDX-License-Identifier: Apache-2.0
"""What a run prints, on a terminal and elsewhere."""

import os
import pty
import subprocess
import sys
import time

from dsjax.config import stage_clock
from dsjax.objectives import SFT
from dsjax.training.console import (
    Loading,
    Progress,
    banner,
    exporting,
    trainable_line,
    trainable_table,
    working,
)

VALUES = {
    "epoch": 0.5,
    "loss": 1.25,
    "learning_rate": 2e-4,
    "tokens_per_second": 1234.0,
    "mfu": None,
    "step_time": 0.25,
}


def control_characters(text):
    return [char for char in text if not char.isprintable() and char != "\n"]


def test_loading_tells_small_and_large_files_in_units_that_show_them(capsys):
    Loading()(2**18, 2**18)
    Loading("writing")(3 * 2**30, 3 * 2**30)
    small, large = capsys.readouterr().err.splitlines()
    assert small.startswith("reading weights: 0.25 of 0.25 MiB, ")
    assert large.startswith("writing: 3.00 of 3.00 GiB, ")


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Progress(SFT, 20, start_step=10) as progress:
        for step in range(11, 21):
            progress.advance(step)
            if step % 5 == 0:
                memory = {"device_memory_gib": 61.26} if step == 20 else {}
                progress.log(step, VALUES | memory)
        progress.log_eval(20, {"eval_loss": 0.5, "eval_perplexity": 1.6487, "eval_tokens": 9})
    out, err = capsys.readouterr()
    start = "step 15/20 | epoch 0.50 | loss 1.2500 | lr 2.00e-04 | 1,234 tokens/s"
    assert out == ""
    assert err.splitlines() == [
        f"{start} | 0.250 s/step | ETA 0:00:00",
        f"{start.replace('15', '20', 1)} | 0.250 s/step | 61.3 GiB | ETA 0:00:00",
        "step 20/20 | eval loss 0.5000 | perplexity 1.649",
    ]


def test_steps_that_train_nothing_are_explained_once_and_counted(capsys):
    with Progress(SFT, 4) as progress:
        for step, untrained in enumerate([0, 1, 1, 2], 1):
            told = {"untrained_steps": untrained} if untrained else {}
            progress.log(step, {"loss": 1.25 if step != 2 else None} | told)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("step 2/4 | 1 of the steps so far had a batch without one trained ")
    assert [line.partition(" | ETA")[0] for line in lines[:1] + lines[2:]] == [
        "step 1/4 | loss 1.2500",
        "step 2/4 | untrained 1",
        "step 3/4 | loss 1.2500 | untrained 1",
        "step 4/4 | loss 1.2500 | untrained 2",
    ]


def test_no_escape_codes_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    banner({"model": "x" * 300, "target": "[q_proj]"})
    trainable_table([("q_proj.weight", "2 x 8 x 96", "float32", 1536, 1536)], 34016)
    with Progress(SFT, 2) as progress:
        progress.advance(1)
        progress.log(1, VALUES)
    out, err = capsys.readouterr()
    assert out == ""
    assert control_characters(err) == []
    assert err.isascii()


def test_banner_shows_texts_literally_and_groups_digits(capsys):
    banner(
        {
            "packing": True,
            "model": "org/name",
            "target_modules": "[q_proj] :smile:",
            "tokens": 1234567,
        },
        "run",
    )
    err = capsys.readouterr().err
    for text in ("run", " True ", "org/name", "[q_proj] :smile:", "1,234,567"):
        assert text in err


def test_trainable_line_is_pefts():
    line = "trainable params: 1,536 || all params: 34,016 || trainable%: 4.5155"
    assert trainable_line(1536, 34016) == line


def test_trainable_table_prints_what_it_returns(capsys):
    rows = [
        ("layers.q_proj.weight", "4 x 16 x 16", "float32", 512, 1024),
        ("norm.weight", "1032", "bfloat16", 1032, 1032),
    ]
    text = trainable_table(rows, 3088)
    assert capsys.readouterr().err == text + "\n"
    assert text.splitlines() == [
        "module                shape        dtype        trainable",
        "layers.q_proj.weight  4 x 16 x 16  float32   512 of 1,024",
        "norm.weight           1032         bfloat16         1,032",
        "trainable params: 1,544 || all params: 3,088 || trainable%: 50.0000",
    ]


def wait_for(text, capsys):
    """Whether a clock of 0.05 s comes to say a text."""
    said, until = "", time.monotonic() + 20
    while text not in said and time.monotonic() < until:
        time.sleep(0.01)
        said += capsys.readouterr().err
    return text in said


def test_what_takes_long_says_so_at_once_and_again(capsys, monkeypatch):
    monkeypatch.setattr(stage_clock, "PAUSES", (0.05,))
    with working("reading rows") as tell:
        assert capsys.readouterr().err.startswith("reading rows\n")
        tell("3 of data.train")
        assert wait_for("reading rows: 3 of data.train (0:00:", capsys)
    with working("reading rows", primary=False) as tell:
        tell("4 of data.train")
    assert capsys.readouterr() == ("", "")


def test_an_export_says_what_is_written_and_that_it_is_proven(capsys, monkeypatch):
    monkeypatch.setattr(stage_clock, "PAUSES", (0.05,))
    for done, words in ((2**19, "0.50 of 1.00 MiB written"), (2**20, "written; proving it")):
        with exporting() as told:
            assert capsys.readouterr().err.startswith("exporting\n")
            told(done, 2**20)
            assert wait_for(f"exporting: {words} (0:00:", capsys)


def test_the_first_step_has_a_clock_where_there_is_no_bar(capsys, monkeypatch):
    monkeypatch.setattr(stage_clock, "PAUSES", (0.05,))
    with Progress(SFT, 2) as progress:
        assert wait_for("the first step (0:00:", capsys)
        progress.advance(1)
        capsys.readouterr()
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_an_evaluation_that_takes_long_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(stage_clock, "PAUSES", (0.05,))
    progress = Progress(SFT, 2)
    with progress.evaluating(2_000) as told:
        told(1_500)
        assert wait_for("evaluating: batch 1,500 of 2,000 (0:00:", capsys)


def test_other_processes_print_nothing(capsys):
    with Progress(SFT, 2, primary=False) as progress:
        with progress.evaluating(3) as told:
            told(1)
        progress.advance(1)
        progress.log(1, VALUES)
        progress.log_eval(1, {"eval_loss": 0.5})
    assert capsys.readouterr() == ("", "")


SCRIPT = """
from dsjax.objectives import SFT
from dsjax.training.console import Progress
with Progress(SFT, 2) as progress:
    progress.log(1, {"loss": 1.25, "tokens_per_second": 1234.0, "learning_rate": 2e-4})
    with progress.evaluating(7) as told:
        told(7)
        progress._bar.refresh()
    progress.log_eval(1, {"eval_loss": 0.5})
    print("result")
"""


def run_on_a_terminal(script):
    """Return (stdout, stderr) of a script whose stderr is a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b"".join(iter(lambda: read_terminal(ours), b""))
        os.close(ours)
        out, _ = process.communicate()
    assert process.returncode == 0, shown
    return out.decode(), shown.decode()


def read_terminal(descriptor):
    # Linux ends a terminal whose last writer has gone with an error, not with an empty read.
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def test_bar_on_a_terminal_leaves_stdout_alone():
    out, err = run_on_a_terminal(SCRIPT)
    assert out == "result\n"
    assert "\x1b[" in err
    line = "step 1/2 | loss 1.2500 | lr 2.00e-04 | 1,234 tokens/s"
    evaluation = ("7/7", "batches of the evaluation", "eval loss 0.5000")
    for text in (line, "1/2", "ETA", *evaluation):
        assert text in err
