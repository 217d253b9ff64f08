# SPDX-License-Identifier: Apache-2.0
"""The clock beside what takes long: lines in a log, one line on a terminal."""

import time

import pytest

from dsjax.config import stage_clock
from dsjax.config.stage_clock import PAUSES, StageClock, clock


def wait_for(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    said, until = "", time.monotonic() + 20
    while text not in said and time.monotonic() < until:
        time.sleep(0.01)
        said += capsys.readouterr().err
    return said


def test_a_log_has_a_line_every_two_seconds_at_first_and_then_fewer():
    assert max(PAUSES[:5]) == 2 and list(PAUSES) == sorted(PAUSES)


def test_a_log_is_told_again_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(stage_clock, "PAUSES", (0.05,))
    with StageClock("reading") as told:
        assert wait_for("(0:00:0", capsys).startswith("reading\nreading (0:00:0")
        told.tell("half")
        assert "reading: half (0:00:" in wait_for("half (", capsys)


def test_on_a_terminal_one_line_is_written_over_and_gone_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(stage_clock, "RENEWED", 0.05)
    with StageClock("importing", at_once=False, in_place=True):
        shown = wait_for("importing", capsys)
    shown += capsys.readouterr().err
    assert shown.startswith("\rimporting (0:00:0") and shown.endswith("\r" + " " * 19 + "\r")
    assert "\n" not in shown


def test_what_is_over_soon_says_nothing(capsys):
    with StageClock("importing", at_once=False, in_place=True):
        pass
    assert capsys.readouterr().err == ""


def test_it_counts_hours_minutes_and_seconds():
    assert [clock(seconds) for seconds in (0.4, 62.0, 3723.0)] == ["0:00:00", "0:01:02", "1:02:03"]
