# SPDX-License-Identifier: Apache-2.0
"""The page of `dsjax view` in a browser: it draws, without an error, and does what a user asks."""

import json
import math
import re
import struct
from datetime import UTC, datetime
from pathlib import Path

import pytest
from browser import dump_dom, take_picture
from page_runs import evaluation, line, make_run

from dsjax.training.run_dir import RunDir
from dsjax.view.page import source_of, to_html
from dsjax.view.snapshot import read_snapshot

pytestmark = pytest.mark.chromium

MADE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def write_page(folder: Path, *runs: RunDir, act: str = "") -> Path:
    """Write the page of some runs, with JavaScript at its end that does what a user would."""
    html = to_html([read_snapshot(run, run.path.name) for run in runs], MADE)
    (script,) = re.findall("<script>(.*)</script>", html, re.S)
    html = html.replace(source_of(script), source_of(script + act)).replace(script, script + act)
    page = folder / "view.html"
    page.write_text(html, "utf-8")
    return page


def drawn(page: Path) -> str:
    """The page's elements, of which none tells of an error; without the data and the script."""
    html = re.sub(r"<script.*?</script>", "", dump_dom(page), flags=re.S)
    (failure,) = re.findall(r'<p id="failure"[^>]*>(.*?)</p>', html)
    assert failure == "" and "as of 2026-01-02 03:04:05 UTC" in html
    return html


def figures(html: str) -> dict[str, str]:
    """The charts by their keys."""
    found = re.findall(r"<figure.*?</figure>", html, re.S)
    return {re.search(r"<b>(.*?)</b>", figure)[1]: figure for figure in found}


def paths(figure: str) -> list[str]:
    return [path for path in re.findall(r'<path d="([^"]*)"', figure)]


def test_one_run(tmp_path: Path):
    run = make_run(tmp_path / "run<b>", more={"device_memory_gib": 5, "note": "text"})
    html = drawn(write_page(tmp_path, run))
    charts = figures(html)
    assert list(charts) == [
        *("loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_second"),
        *("step_time", "device_memory_gib", "eval_perplexity"),
    ]  # no mfu, which is null on a CPU, and no text
    assert len(paths(charts["loss"])) == 2  # training, evaluations
    assert charts["loss"].count("<circle") == 2
    assert [path.count("L") for path in paths(charts["grad_norm"])] == [49]
    assert paths(charts["device_memory_gib"])[0].endswith("h0")  # a point alone
    assert re.search(r"<dt>peak GiB</dt><dd>5[.0]*</dd>", html)
    assert "run&lt;b&gt;" in html and "<b>run" not in html
    assert "100 (final)" in html and "1:02:03" in html and "path: runs/quickstart" in html
    assert re.search('<section id="differences"[^>]*hidden', html)


def test_two_runs(tmp_path: Path):
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", "adapter.r=8", steps=40, ended=False),
    ]
    html = drawn(write_page(tmp_path, *runs))
    loss = figures(html)["loss"]
    assert re.findall(r'class="(line[^"]*)"', loss.partition('class="plot"')[2]) == [
        *("line colour-0", "line colour-0 dashed", "line colour-1"),
    ]
    assert [title for title in re.findall(r'<li title="(.*?)"', loss)] == [
        "a",
        "a, evaluation",
        "b",
    ]
    (table,) = re.findall(r'<section id="differences".*?</section>', html, re.S)
    cells = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", table)
    assert cells == ["", "a", "b", "adapter.r", "16", "8", "training.max_steps", "100", "40"]
    assert re.findall(r"<mark>(.*?)</mark>", html) == [
        *("  r: 16", "  max_steps: 100", "  r: 8", "  max_steps: 40"),
    ]


def test_many_lines_are_thinned_and_keep_their_extremes(tmp_path: Path):
    run = make_run(tmp_path / "run", ended=False)
    losses = {step: 99.0 if step == 4321 else math.sin(step) ** 2 for step in range(1, 9001)}
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in losses.items()]
    run.metrics.write_text("\n".join(lines) + "\n")
    chart = figures(drawn(write_page(tmp_path, run)))["loss"]
    assert "drawn: the lowest and the highest of every 9 lines" in chart
    faint, smooth = paths(chart)
    assert faint.count("L") < 2000 and smooth.count("L") < 2000
    assert ">100</text>" in chart or ">80</text>" in chart
    heights = [float(y) for y in re.findall(r"[ML][\d.-]+ ([\d.-]+)", faint)]
    assert sum(y < 100 for y in heights) == 1


def test_what_a_user_does(tmp_path: Path):
    act = """
        {
        const plot = document.querySelector(".plot");
        const box = plot.getBoundingClientRect();
        const press = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", { key }));
        const said = () => document.body.append(element("output", {}, find("cursor").textContent));
        const point = (type, part) => plot.dispatchEvent(new PointerEvent(type, {
          pointerId: 1, button: 0, clientX: box.left + part * box.width, clientY: box.top + 50,
        }));
        const steps = () => document.body.append(element("var", {}, `${view.from} ${view.to}`));
        find("smooth").click(); press("ArrowRight"); press("ArrowRight"); said();
        press("End"); press("ArrowLeft"); said();
        find("smooth").click(); find("log").click();
        steps(); find("from").value = 21; find("from").dispatchEvent(new Event("change")); steps();
        press("Home"); said();
        find("to").value = 3; find("to").dispatchEvent(new Event("change")); steps();
        press("Escape"); said(); steps();
        point("pointerdown", 0.5); point("pointermove", 0.75); point("pointerup", 0.75); steps();
        }
    """
    html = drawn(write_page(tmp_path, make_run(tmp_path / "run"), act=act))
    assert re.findall("<output>(.*?)</output>", html) == [
        f"loss, step 4: training {loss(4):#.4g} (EMA {average(4):#.4g}), evaluation none yet",
        f"loss, step 98: training {loss(98):#.4g} (EMA {average(98):#.4g}), "
        f"evaluation {evaluation(50)['eval_loss']:#.4g}",
        f"loss, step 22: training {loss(22):#.4g}, evaluation none yet",  # smooth no more
        "all steps",
    ]
    *asked, dragged = re.findall("<var>(.*?)</var>", html)
    assert asked == ["2 100", "21 100", "21 100", "2 100"]  # from 2 to 3: refused
    first, end = map(int, dragged.split())
    assert 46 <= first <= 52 and 70 <= end <= 78


def loss(step: int) -> float:
    return line(step)["loss"]


def average(step: int) -> float:
    """The mean of the lines up to a step, every second one, each weighing 0.9 of the next."""
    weights = {earlier: 0.9 ** ((step - earlier) // 2) for earlier in range(2, step + 1, 2)}
    return sum(w * loss(at) for at, w in weights.items()) / sum(weights.values())


def test_a_picture(tmp_path: Path):
    page, picture = write_page(tmp_path, make_run(tmp_path / "run")), tmp_path / "view.png"
    take_picture(page, picture, 1200, 800)
    header = picture.read_bytes()[:24]
    assert header[1:4] == b"PNG" and struct.unpack(">2I", header[16:]) == (1200, 800)
    assert picture.stat().st_size > 20_000  # and not one colour
