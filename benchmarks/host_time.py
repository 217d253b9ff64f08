# SPDX-License-Identifier: Apache-2.0
"""What the loop costs the host at every step, and how long it waits for its input.

    python benchmarks/host_time.py [--data FILE ... --tokenizer DIR] [--steps 500] ...

The loop is that of `dsjax.train`, with its loader, meter, logs, progress and checkpoints.
`trivial`: a model of a few thousand parameters, whose step the device does in no time. Per step:
the compiled step called again and again; the loop around it; the loop around a step that does
nothing, which is the host's own work (its time on a processor is right on a busy machine too).
`input`: rows of real length around a step that sleeps, as a host does whose device computes; what
the loop waits for the next batch, and how long the loader takes for a batch when nobody computes.
Rows are synthetic where no data are given. Out: a table, and JSON under benchmarks/results.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import machine  # noqa: E402
import synthetic  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "host_time.json"
WARM_UP = 20
"""Steps at the start that do not count: threads start, caches fill."""

TRIVIAL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@dataclass
class TimedStep:
    """A train step that notes when it is called."""

    step: Callable[..., Any]
    began: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)

    def __call__(self, *arrays: Any) -> Any:
        self.began.append(time.perf_counter())
        self.worked.append(time.thread_time())
        return self.step(*arrays)

    def processor_seconds(self) -> float:
        """The loop's thread on a processor, mean per step past the warm-up."""
        times = self.worked[WARM_UP:]
        return (times[-1] - times[0]) / (len(times) - 1)

    def seconds(self) -> list[float]:
        """From call to call, past the warm-up."""
        times = self.began[WARM_UP:]
        return [after - before for before, after in zip(times, times[1:], strict=False)]


class TimedLoader:
    """A loader that notes how long each batch is waited for."""

    def __init__(self, loader: Any):
        self._loader = loader
        self.waits: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def iterate(self, start: int, stop: int) -> Iterator[Any]:
        batches = self._loader.iterate(start, stop)
        with contextlib.closing(batches):
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                self.waits.append(time.perf_counter() - began)
                yield batch


def run_loop(folder: Path, words: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Run the real loop once, or the step without it.

    Args:
        folder: holds `model` and the rows; the run's output comes beside them.
        words: the settings.
        kind: what runs: `bare`, the compiled step alone; the loop with the step (`real`), with one
            that does `nothing`, with one that sleeps (`sleep`).
    """

    from dsjax import train
    from dsjax.distributed.processes import Hosts
    from dsjax.training import run_data
    from dsjax.training.evaluation import to_devices
    from dsjax.training.run import Run
    from dsjax.training.setup import assemble, load_frozen, load_trainable
    from dsjax.training.state import init_state, step_config

    config = _config(folder, words, kind)
    setup = assemble(config)
    data, total = run_data.read_data(config, setup, datetime.now()), config.training.max_steps
    assert total is not None
    step = step_config(config, setup.partition, setup.mesh, total)
    frozen = load_frozen(setup, 0)
    state = init_state(load_trainable(setup, frozen, 0), step, 0)
    if kind in ("bare", "real"):
        take, _ = train.compile_step(step, [step.remat], data.train, Hosts())
    else:
        take = _idle(words.sleep_ms / 1000 if kind == "sleep" else 0.0)
    if kind == "bare":
        rows = to_devices(data.train.batch(0), setup.mesh)
        return {"step_seconds": _repeated(take, state, frozen, rows, total)}
    run = Run(config, setup, data, total, "", {}, Hosts())
    return _timed(run, take, frozen, state)


def _timed(run: Any, take: Callable[..., Any], frozen: Any, state: Any) -> dict[str, Any]:
    """The loop over a run's steps, and what it took."""
    import jax

    from dsjax.training.checkpoint import Checkpointer
    from dsjax.training.console import Progress
    from dsjax.training.loop import Loop, Reporting
    from dsjax.training.meter import Meter
    from dsjax.training.metrics_log import MetricsLog
    from dsjax.training.run import Programs

    config, data = run.config, run.data
    timed, loader = TimedStep(take), TimedLoader(data.train)
    run = replace(run, data=replace(data, train=loader, eval=None))
    run.directory.path.mkdir()
    saver = Checkpointer(run.directory.checkpoints, config.checkpoint)
    with (
        MetricsLog(run.directory.path, config.logging, 0) as log,
        Progress(run.objective, run.total) as progress,
    ):
        reporting = Reporting(Meter(run.objective), log, progress)
        loop = Loop(run, Programs(timed, None), frozen, saver, {}, reporting)
        state, _ = loop.steps(state, 0)
    jax.block_until_ready(state)
    seconds, waits = timed.seconds(), loader.waits[WARM_UP:]
    return {
        "step_seconds": statistics.mean(seconds),
        "median_step_seconds": statistics.median(seconds),
        "worst_step_seconds": max(seconds),
        "processor_seconds": timed.processor_seconds(),
        "wait_seconds": statistics.mean(waits),
        "median_wait_seconds": statistics.median(waits),
        "worst_wait_seconds": max(waits),
        "first_wait_seconds": loader.waits[0],
        "tokens_per_batch": data.train.sequence_length * config.training.batch_size,
    }


def _repeated(take: Callable[..., Any], state: Any, frozen: Any, rows: Any, count: int) -> float:
    """Seconds of a step that is called again and again."""
    import jax

    for _ in range(WARM_UP):
        state, told = take(state, frozen, rows)
    jax.block_until_ready(state)
    began = time.perf_counter()
    for _ in range(count):
        state, told = take(state, frozen, rows)
    jax.block_until_ready((state, told))
    return (time.perf_counter() - began) / count


def _idle(seconds: float) -> Callable[..., Any]:
    """A step that trains nothing and tells the same each time."""
    import jax.numpy as jnp

    from dsjax.training.state import StepReport

    one, count = jnp.float32(1.0), jnp.int32(1)
    sums = {"loss": one, "weight": one, "correct": one, "tokens": count}
    told = StepReport(sums, one, one, one, count, None)

    def step(state: Any, frozen: Any, rows: Any) -> Any:
        if seconds:
            time.sleep(seconds)
        return state, told

    return step


def loader_alone(folder: Path, words: argparse.Namespace) -> dict[str, Any]:
    """How long the loader needs for a batch when nobody else works."""
    from dsjax.training import run_data
    from dsjax.training.setup import assemble

    config = _config(folder, words, "sleep")
    data = run_data.read_data(config, assemble(config), datetime.now())
    batches = data.train.iterate(0, words.input_steps + WARM_UP)
    for _ in range(WARM_UP):
        next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return {"batch_seconds": (time.perf_counter() - began) / words.input_steps}


def _config(folder: Path, words: argparse.Namespace, kind: str) -> Any:
    from dsjax.config import RunConfig

    wide = kind == "sleep"
    files = words.data if wide and words.data else [str(folder / "rows.jsonl")]
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "adapter": {"peft_type": "LORA", "r": 2},
            "data": {"train": files, "max_length": words.length if wide else 32},
            "training": {
                "batch_size": words.rows if wide else 4,
                "max_steps": words.input_steps + WARM_UP if wide else words.steps + WARM_UP,
            },
            "checkpoint": {"save_steps": 10**6},
            "output_dir": str(folder / kind),
        }
    )


def write_inputs(folder: Path, words: argparse.Namespace, vocabulary: int) -> None:
    """Write the model and synthetic rows; the user's tokenizer goes into the model's folder."""
    import numpy as np

    folder.mkdir()
    config = synthetic.llama_config("float32", **(TRIVIAL | {"vocab_size": vocabulary}))
    synthetic.write_checkpoint(folder / "model", config, "float32")
    if words.tokenizer:
        for file in words.tokenizer.glob("tokenizer*.json"):
            shutil.copy(file, folder / "model")
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 64, rng.integers(20, 400)).tolist() for _ in range(2000)]
    lines = (json.dumps({"input_ids": row}) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text("".join(lines))


def measure(words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    from dsjax.data import load_tokenizer

    write_inputs(folder / "trivial", words, TRIVIAL["vocab_size"])
    kinds = ("bare", "real", "nothing")
    trivial = {kind: run_loop(folder / "trivial", words, kind) for kind in kinds}
    beyond = trivial["real"]["step_seconds"] - trivial["bare"]["step_seconds"]
    vocabulary = TRIVIAL["vocab_size"]
    if words.tokenizer:
        tokenizer = load_tokenizer(words.tokenizer)
        vocabulary = -(-len(tokenizer) // 128) * 128
    write_inputs(folder / "input", words, vocabulary)
    asleep = run_loop(folder / "input", words, "sleep")
    share = asleep["wait_seconds"] / asleep["step_seconds"]
    return {
        "trivial": trivial | {"beyond_the_device_seconds": beyond},
        "input": asleep | {"share_waited": share} | loader_alone(folder / "input", words),
    }


def report(results: dict[str, Any]) -> str:
    """The table of a result."""
    trivial, waited = results["trivial"], results["input"]
    nothing = trivial["nothing"]
    rows = [
        ("the compiled step alone", trivial["bare"]["step_seconds"]),
        ("the loop with the step", trivial["real"]["step_seconds"]),
        ("the loop beyond the step", trivial["beyond_the_device_seconds"]),
        ("the loop with a step that does nothing", nothing["step_seconds"]),
        ("the same, median", nothing["median_step_seconds"]),
        ("the same, time on a processor", nothing["processor_seconds"]),
        ("waiting for a batch, step that sleeps", waited["wait_seconds"]),
        ("the longest such wait", waited["worst_wait_seconds"]),
        ("the first one", waited["first_wait_seconds"]),
        ("the loader alone, a batch", waited["batch_seconds"]),
    ]
    lines = ["| | ms |", "|---|---|", *(f"| {name} | {1e3 * s:.3f} |" for name, s in rows)]
    lines.append(
        f"\nInput: {waited['tokens_per_batch']:,} tokens a batch, waited for during "
        f"{waited['share_waited']:.3%} of a step of {1e3 * waited['step_seconds']:.1f} ms."
    )
    return "\n".join(lines)


def main() -> int:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="of the trivial model")
    parser.add_argument("--input-steps", type=int, default=100, help="with real rows")
    parser.add_argument("--sleep-ms", type=float, default=100.0, help="of a step with real rows")
    parser.add_argument("--rows", type=int, default=16, help="of a batch of real rows")
    parser.add_argument("--length", type=int, default=2048, help="of a real row")
    parser.add_argument("--data", nargs="+", help="files as for data.train; default: synthetic")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for --data")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file")
    words = parser.parse_args()
    described = machine.describe()
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain's workers ask for them
    with tempfile.TemporaryDirectory(prefix="dsjax-host-time-") as name:
        results = measure(words, Path(name))
    # Files by name: where they lie says nothing elsewhere.
    shown = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    result = {
        "command": " ".join(["python benchmarks/host_time.py", *shown]),
        "machine": described,
        "results": results,
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(result, indent=2) + "\n")
    print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
