# SPDX-License-Identifier: Apache-2.0
"""The picture of a run's losses.

In: `metrics.jsonl`. Out: `training_loss.png`. Not done here: what is logged.
"""

from collections.abc import Sequence
from pathlib import Path

from dsjax.errors import files_of
from dsjax.training.metrics_log import read_metrics
from dsjax.training.run_dir import RunDir


def plot_loss(output_dir: Path) -> Path | None:
    """Draw `training_loss.png` from `metrics.jsonl`; None, and no file, if no loss was logged."""
    run = RunDir(output_dir)
    rows = read_metrics(run.metrics)
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    evals = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    if not train:
        return None
    # Imported here: a second that no other command should pay. Not pyplot: it is global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    points, label = _binned(train, "training")
    steps, losses = zip(*points, strict=True)
    marker = "o" if len(train) <= 30 else None
    axes.plot(steps, losses, color="#9db7d5", linewidth=1.2, marker=marker, ms=3, label=label)
    axes.plot(steps, _smooth(losses), color="#1f4e8c", linewidth=2, label="training, smoothed")
    if evals:
        points, label = _binned(evals, "evaluation")
        axes.plot(*zip(*points, strict=True), "o-", color="#d1495b", ms=5, label=label)
    axes.set(title="Training loss", xlabel="optimizer step", ylabel="loss per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    path = run.loss_plot
    beside = path.with_name("training_loss.tmp.png")
    with files_of(path):
        figure.savefig(beside)
        beside.replace(path)
    return path


MOST_POINTS = 1000
"""Points of a curve, about as many as the picture has columns; memory grows with their square."""


def _binned(
    points: Sequence[tuple[int, float]], name: str
) -> tuple[list[tuple[float, float]], str]:
    """Return at most MOST_POINTS means of as many points each, and a label that says so."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return [(float(step), float(loss)) for step, loss in points], name
    bins = [points[place : place + size] for place in range(0, len(points), size)]
    means = [
        (sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part))
        for part in bins
    ]
    return means, f"{name}, means of {size} lines"


def _smooth(losses: Sequence[float]) -> list[float]:
    """Return centred means over about a fifteenth of the points; a trailing mean would lag."""
    reach = max(len(losses) // 30, 1)
    windows = [losses[max(place - reach, 0) : place + reach + 1] for place in range(len(losses))]
    return [sum(window) / len(window) for window in windows]
