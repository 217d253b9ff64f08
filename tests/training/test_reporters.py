# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and trackers: what is refused, what a failing tracker does, what arrives in each."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, get_args

import pytest
import yaml

from dsjax.config import LoggingSection
from dsjax.errors import ConfigError
from dsjax.training import reporters
from dsjax.training.metrics_log import MetricsLog, read_metrics
from dsjax.training.reporters import PROJECT, REPORTERS, Kind, ReportedRun, check_reporters
from dsjax.training.run_dir import RunDir

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("reported_run.py")
WANDB = LoggingSection(report_to=["wandb"])


class Unreachable:
    """A tracker whose server is gone after the first report."""

    def __init__(self, run: ReportedRun) -> None:
        self.taken: list[tuple[int, Mapping[str, float]]] = []
        print("hello from a library")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the first."""
        if self.taken:
            raise ConnectionError("no route\nto the server")
        self.taken.append((step, values))

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Take it."""

    def close(self, failed: bool) -> None:
        """Fail."""
        raise TimeoutError


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name `wandb` stands for such a tracker."""
    monkeypatch.setattr(reporters, "REPORTERS", MappingProxyType({"wandb": Kind(Unreachable)}))


def test_each_reporter_that_the_configuration_knows_has_an_entry():
    (listed, _) = get_args(LoggingSection.model_fields["report_to"].rebuild_annotation())
    assert set(REPORTERS) == set(get_args(get_args(listed)[0]))


def test_what_is_not_installed_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporters, "find_spec", lambda name: None)
    both = LoggingSection(report_to=["wandb", "swanlab"])
    with pytest.raises(ConfigError) as caught:
        check_reporters(both, primary=True)
    assert str(caught.value) == "\n".join(
        f"logging.report_to: got {name}, which is not installed, expected a package that is; "
        f"pip install {name}"
        for name in both.report_to
    )
    check_reporters(both, primary=False)  # they need none


def test_a_tracker_without_a_login_is_refused(monkeypatch: pytest.MonkeyPatch):
    def login() -> None:
        raise PermissionError("no API key")

    monkeypatch.setattr(reporters, "find_spec", lambda name: SimpleNamespace(origin=name))
    kinds = MappingProxyType({"wandb": Kind(Unreachable, login)})
    monkeypatch.setattr(reporters, "REPORTERS", kinds)
    with pytest.raises(ConfigError) as caught:
        check_reporters(WANDB, primary=True)
    assert str(caught.value) == (
        "logging.report_to: got wandb, which takes no run (PermissionError: no API key), expected "
        "a login that its server knows; run `wandb login`, or set WANDB_MODE=offline"
    )


def test_a_tracker_that_cannot_begin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(run: ReportedRun) -> Unreachable:
        raise TimeoutError("no answer")

    both = LoggingSection(report_to=["tensorboard", "wandb"])
    kinds = MappingProxyType({**REPORTERS, "wandb": Kind(refuse)})
    monkeypatch.setattr(reporters, "REPORTERS", kinds)
    with pytest.raises(ConfigError, match=r"got wandb, which did not begin a run \(TimeoutError"):
        MetricsLog(RunDir(tmp_path), both, 0)


@pytest.mark.usefixtures("unreachable")
def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    with MetricsLog(RunDir(tmp_path), WANDB, 0) as log:
        for step in range(1, 5):
            log.log(step, {"loss": 1 / step})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "hello from a library",
        "wandb: step 2 is not reported (ConnectionError: no route); the run goes on, and "
        "metrics.jsonl has all; further failures are counted",
        "wandb: 4 reports failed in all",
    ]


@pytest.mark.usefixtures("unreachable")
def test_other_processes_open_no_tracker(tmp_path: Path, capsys: pytest.CaptureFixture):
    with MetricsLog(RunDir(tmp_path), WANDB, 0, primary=False) as log:
        log.log(1, {"loss": 1.0})
    assert capsys.readouterr().err == ""


def test_all_starts_of_a_run_have_one_id_and_a_new_run_has_another(tmp_path: Path):
    def start(resume_step: int) -> str:
        return ReportedRun(RunDir(tmp_path), resume_step, {}).id

    first = start(0)
    assert first.isalnum() and first == first.lower() and len(first) == 21
    assert start(5) == first
    assert start(0) != first
    (tmp_path / "tracker_id").unlink()  # an earlier version wrote none
    assert start(5) == start(7)


def test_a_run_is_called_as_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert ReportedRun(RunDir(Path(".")), 0, {}).name == tmp_path.name


def killed_and_resumed(name: str, folder: Path, **environment: str) -> Path:
    """Log steps 1 to 3, then go on from step 1 to 4; returns the run's folder."""
    run = folder / "run"
    run.mkdir()
    for resume_step, last in ((0, 3), (1, 4)):
        done = subprocess.run(
            [sys.executable, str(PROGRAM), name, str(run), str(resume_step), str(last)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "" and "not reported" not in done.stderr
    return run


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run's file, each of which lies within a block."""
    record: Any = import_module("wandb.proto.wandb_internal_pb2").Record
    data, place = file.read_bytes(), 7
    while place < len(data):
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        assert kind == 1, "a record in parts"
        yield record.FromString(data[place + 7 : place + 7 + length])
        place += 7 + length


@pytest.mark.wandb
def test_wandb(tmp_path: Path):
    run = killed_and_resumed("wandb", tmp_path, WANDB_MODE="offline")
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    name = (run / "tracker_id").read_text().strip()
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    losses: list[list[tuple[int, float]]] = []
    for file in files:
        records = list(wandb_records(file))
        (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert (begun.project, begun.display_name, begun.resumed) == ("dsjax", "run", False)
        config = {update.key: json.loads(update.value_json) for update in begun.config.update}
        assert config["model"] == {"path": "deepseek-ai/tiny"}
        rows = [
            {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in r.history.item
            }
            for r in records
            if r.WhichOneof("record_type") == "history"
        ]
        losses.append([(row["step"], row["train/loss"]) for row in rows if "train/loss" in row])
        assert [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row] == [
            (losses[-1][-1][0], 2.0)
        ]
        assert {"config", "trainable"} <= {key.split("/")[0] for row in rows for key in row}
    # What comes below the last step is kept: the step is a value like the others.
    assert losses == [[(1, 1.0), (2, 0.5), (3, 1 / 3)], [(2, 1.5), (3, 1 + 1 / 3), (4, 1.25)]]


@pytest.mark.wandb
def test_wandb_takes_the_project_from_its_own_variable(tmp_path: Path):
    run = killed_and_resumed("wandb", tmp_path, WANDB_MODE="offline", WANDB_PROJECT="mine")
    for file in run.glob("wandb/offline-run-*/*.wandb"):
        projects = [r.run.project for r in wandb_records(file) if r.HasField("run")]
        assert projects == ["mine"]


@pytest.mark.wandb
def test_wandb_without_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "stdin", None)
    code = (
        "from dsjax.config import LoggingSection\n"
        "from dsjax.training.reporters import check_reporters\n"
        "check_reporters(LoggingSection(report_to=['wandb']), True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "got wandb, which takes no run (UsageError: No API key configured" in done.stderr


@pytest.mark.trackio
def test_trackio(tmp_path: Path):
    run = killed_and_resumed("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    name = f"run-{(run / 'tracker_id').read_text()[:8]}"
    with sqlite3.connect(tmp_path / "trackio" / f"{PROJECT}.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = base.execute("select run_name, config from configs").fetchall()
    assert {row[0] for row in rows} == {name}
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    losses = [(step, metrics["train/loss"]) for step, metrics in values if "train/loss" in metrics]
    assert losses == [(1, 1.0), (2, 0.5), (3, 1 / 3), (2, 1.5), (3, 1 + 1 / 3), (4, 1.25)]
    assert (3, {"eval/loss": 2.0}) in values
    ((_, config),) = configs
    assert json.loads(config)["model"] == {"path": "deepseek-ai/tiny"}


@pytest.mark.swanlab
def test_swanlab(tmp_path: Path):
    run = killed_and_resumed("swanlab", tmp_path, SWANLAB_MODE="offline")
    name = (run / "tracker_id").read_text().strip()
    starts = sorted(run.glob("swanlog/run-*"))
    assert len(starts) == 2
    for start in starts:
        assert start.name.endswith(name)
        (file,) = start.glob("*.swanlab")
        data = file.read_bytes()
        assert all(tag in data for tag in (b"train/loss", b"eval/loss", b"trainable", b"dsjax"))
        config = yaml.safe_load((start / "files" / "config.yaml").read_text())
        assert "deepseek-ai/tiny" in str(config["model"])
