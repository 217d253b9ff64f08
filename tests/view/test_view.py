# SPDX-License-Identifier: Apache-2.0
"""`dsjax view`: its page holds what the files hold; what is refused, and opened."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from page_runs import make_run

from dsjax.distributed.lock_file import locked
from dsjax.errors import ConfigError
from dsjax.training.run_dir import RunDir
from dsjax.view import command
from dsjax.view.page import differences, source_of, to_html
from dsjax.view.snapshot import Snapshot, read_snapshot

ROOT = Path(__file__).resolve().parents[2]
MADE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOSTILE = "</script><script>alert(1)</script><!--<script>\u2028{{DATA}}"


class Page(HTMLParser):
    """A page as a browser reads it: its tags, and the texts of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("type") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["application/json"])


def page_of(*runs: RunDir) -> Page:
    return Page(to_html([read_snapshot(run, run.path.name) for run in runs], MADE))


def view(*words: object) -> None:
    assert command.main([*map(str, words), "--no-browser"]) == 0


def test_the_page_holds_what_the_files_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "mine")
    view(run)
    assert capsys.readouterr().out == f"{run.view}\n"
    (held,) = Page(run.view.read_text("utf-8")).data["runs"]
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    logged = [row for row in rows if "train_loss" not in row]
    keys = {key for row in logged for key in row} - {"step", "time"}
    assert held["series"] == {
        key: [
            [row["step"] for row in logged if key in row],
            [row[key] for row in logged if key in row],
        ]
        for key in keys
    }
    timeless = [{key: row[key] for key in row if key != "time"} for row in rows]
    assert held["evaluations"] == [row for row in timeless if "eval_loss" in row]
    assert [held["summary"]] == [row for row in timeless if "train_loss" in row]
    assert held["final"] == json.loads(run.eval_results.read_text())
    text = "\n".join(text for _, _, text in held["config"])
    assert re.sub(r"^(  |\w+:\n(?=  ))", "", run.config.read_text(), flags=re.M) == text + "\n"
    assert (held["name"], held["state"], held["progress"]) == ("mine", "finished", "100 of 100")
    assert held["facts"]["method"] == "LORA, r 16"


def test_the_last_line_tells_its_own_time(tmp_path: Path):
    """Of a copy too, whose file has another one; lines of earlier versions have none."""
    run = make_run(tmp_path / "run", ended=False)
    *before, last = run.metrics.read_text().splitlines()
    for written, said in (
        ("2026-01-02T03:04:05+00:00", f"{MADE.astimezone():%Y-%m-%d %H:%M:%S %Z}"),
        (None, "1970-01-01 .* (time of metrics.jsonl)"),
        ("once", "1970-01-01 .* (time of metrics.jsonl)"),
    ):
        row = json.dumps(json.loads(last) | {"time": written})
        run.metrics.write_text("\n".join([*before, row]) + "\n")
        os.utime(run.metrics, (50_000, 50_000))
        found = snapshot_of(run).facts["last line"]
        assert re.fullmatch(said.replace("(", r"\(").replace(")", r"\)"), found)


def test_what_a_run_says_stays_text(tmp_path: Path):
    """Wherever it comes from: a name, a path, a key, a value."""
    run = make_run(tmp_path / "<b>", f"model.path={HOSTILE}", more={HOSTILE: HOSTILE, "new": 1})
    plain = page_of(make_run(tmp_path / "plain"))
    page = page_of(run)
    assert page.tags == plain.tags
    assert page.texts["script"] == plain.texts["script"]
    (held,) = page.data["runs"]
    assert (held["name"], held["facts"]["model"]) == ("<b>", HOSTILE)
    assert held["series"][HOSTILE] == [[2], [HOSTILE]] and held["series"]["new"] == [[2], [1]]


def test_the_page_needs_nothing_and_lets_nothing_else_work(tmp_path: Path):
    html = to_html([read_snapshot(make_run(tmp_path / "run"), "run")], MADE)
    page = Page(html)
    assert [
        tag for tag, attributes in page.tags if {"src", "href", "style"} & attributes.keys()
    ] == []
    assert set(re.findall(r"https?:[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}  # a name
    assert "url(" not in html and "@import" not in html and "innerHTML" not in html
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv"))
    script, style = source_of(page.texts["script"]), source_of(page.texts["style"])
    assert policy == (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; base-uri 'none'; "
        "form-action 'none'"
    )


def test_numbers_without_a_word_in_json(tmp_path: Path):
    run = make_run(tmp_path / "run")
    run.eval_results.write_text('{"step": 100, "eval_loss": NaN, "eval_perplexity": Infinity}')
    (held,) = page_of(run).data["runs"]
    assert held["final"] == {"step": 100, "eval_loss": "NaN", "eval_perplexity": "Infinity"}
    assert held["series"]["mfu"][1] == [None] * 50


def test_what_differs_between_configurations(tmp_path: Path):
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", "adapter.r=8", "data.train=[x.jsonl, y.jsonl]"),
    ]
    snapshots = [read_snapshot(run, run.path.name) for run in runs]
    assert differences(snapshots) == [
        ("adapter.r", ["r: 16", "r: 8"]),
        (
            "data.train",
            ["train:\n- runs/quickstart/data/questions.jsonl", "train:\n- x.jsonl\n- y.jsonl"],
        ),
    ]
    runs[1].config.write_text("output_dir: elsewhere\nnew: {key: 1}\n")  # another version's
    other = [snapshots[0], read_snapshot(runs[1], "b")]
    assert dict(differences(other))["new.key"] == [None, "key: 1"]
    assert dict(differences(other))["adapter.r"] == ["r: 16", None]


def snapshot_of(run: RunDir) -> Snapshot:
    return read_snapshot(run, "run")


def test_whether_a_run_is_at_work(tmp_path: Path):
    stopped = make_run(tmp_path / "stopped", ended=False)
    assert snapshot_of(stopped).state == "stopped"
    with locked(stopped.lock, "held"):
        assert snapshot_of(stopped).state == "running"
    stopped.lock.write_text("a-host-that-is-not-this-one 1 boot\n")  # whose processes nobody sees
    assert snapshot_of(stopped).state == "running"
    stopped.lock.write_text("")
    assert snapshot_of(stopped).state == "stopped"


@pytest.mark.parametrize(
    ("words", "progress"),
    [
        ((), "40 of 100"),
        (("training.max_steps=null", "training.num_train_epochs=3"), "40 of about 120"),
        (("training.max_steps=null", "training.num_train_epochs=0.5"), "40 of about 40"),
    ],
)
def test_how_far_a_run_is(tmp_path: Path, words: tuple[str, ...], progress: str):
    run = make_run(tmp_path / "run", *words, steps=40, ended=False)
    if not words:
        run.config.write_text(run.config.read_text().replace("max_steps: 40", "max_steps: 100"))
    assert snapshot_of(run).progress == progress


def test_what_is_refused(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "other").mkdir()
    empty = make_run(tmp_path / "empty")
    empty.metrics.write_text("")
    unfinished = make_run(tmp_path / "half")
    unfinished.metrics.write_text('{"step": 2, "lo')
    refused = {
        (
            tmp_path / "none",
        ): r"RUN: got '.*none', expected the output_dir of a run; no .*config\.yaml",
        (tmp_path / "other",): r"RUN: got '.*other', expected the output_dir of a run",
        (empty,): r"RUN: got '.*empty', of which metrics\.jsonl has no line, expected a run that",
        (unfinished,): r"RUN: got '.*half', of which metrics\.jsonl has no line",
        (
            run,
            tmp_path / "link",
        ): r"RUN: got .*run and .*link, which are one, expected each run once",
        (run, "--out", tmp_path): r"--out: got the folder '.*', expected a file; name one in it",
        (run, "--out", tmp_path / "no" / "x.html"): r"--out: got '.*x\.html', .* make '.*no'",
        (run, "--out", "gs://bucket/x.html"): r"--out: got 'gs://.*copy it to the bucket",
    }
    for words, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            view(*words)
    assert not run.view.exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metrics.jsonl",
            '{"step": 1, "loss": 2}\nspoilt\n{"step": 3}\n',
            r"metrics\.jsonl:2: got a",
        ),
        ("config.yaml", "model: [\n", r"config\.yaml:2: got .*, expected valid YAML"),
        ("eval_results.json", "{", r"RUN: got invalid JSON in .*eval_results\.json"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, message: str):
    run = make_run(tmp_path / "run")
    (run.path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        view(run)


def test_runs_are_called_by_their_folders_or_else_their_paths(tmp_path: Path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert command.short_names(["a", "b/"]) == ["a", "b"]
    assert command.short_names(["a/x", "b/x"]) == ["a/x", "b/x"]
    assert command.short_names(["."]) == [tmp_path.name]


def test_it_starts_at_once(tmp_path: Path):
    """What takes seconds to import has no part in looking at files."""
    run = make_run(tmp_path / "run")
    heavy = {"jax", "flax", "transformers", "orbax", "datasets", "numpy", "matplotlib"}
    code = (
        "import sys\nfrom dsjax.view.command import main\nmain(sys.argv[1:])\n"
        f"print(*{heavy} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), "--no-browser"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{run.view}\n\n", "")


def test_a_browser_is_opened_where_there_is_a_display(tmp_path: Path):
    """And not waited for: this one ends only once the command has."""
    run, opened = make_run(tmp_path / "a run"), tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nread line < "{tmp_path}/go"\necho "$1" > "{opened}"\n')
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    os.mkfifo(tmp_path / "go")
    command = [sys.executable, "-m", "dsjax.view", str(run)]
    env = os.environ | {"DISPLAY": ":7", "BROWSER": f"{browser} %s"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=60)
    (tmp_path / "go").write_text("now\n")
    deadline = time.monotonic() + 60
    while not opened.exists() or not opened.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert opened.read_text() == run.view.as_uri() + "\n"


@pytest.mark.parametrize(
    ("given", "shown"), [({}, False), ({"DISPLAY": ":0"}, True), ({"WAYLAND_DISPLAY": "w"}, True)]
)
def test_whether_there_is_a_display(monkeypatch, given: dict[str, str], shown: bool):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert command.has_display() is shown
