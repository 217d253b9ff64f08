# SPDX-License-Identifier: Apache-2.0
"""How fast checkpoints come in and go out, and what host memory that takes beyond the arrays.

    python benchmarks/import_export.py [--model llama|deepseek_v3] [--gigabytes 6] [--repeats 3]
                                       [--quantization nf4|int8|fp8]

Makes a synthetic checkpoint in shards of 1 GB, a llama in bfloat16 or a small V3 in FP8, then
measures each way in and out in a process of its own: `import` (load for a LoRA run), `export`
(merge and prove, as a run ends), `to-flax`, `to-hf`; and a plain `cp` of the same files. Memory is
resident memory: above what the libraries and an initialised JAX take, and above the arrays that are
held; with `--quantization` these are the quantized ones, and `import` and `export` alone are
measured. CPU seconds are of all threads together: on a shared machine they say more than seconds.
The files may still be in the page cache when they are read; so they may for `cp`. Out: a table, and
JSON under benchmarks/results.
"""

import argparse
import filecmp
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import machine  # noqa: E402
import synthetic  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3 = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
MODELS = {
    "llama": (synthetic.llama_config, LLAMA, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "deepseek_v3": (
        synthetic.deepseek_v3_config,
        DEEPSEEK_V3,
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
    ),
}
"""--model -> its config.json, its sizes, and the targets of the adapter."""

OUTPUTS = {"export": "merged", "to-flax": "flax", "to-hf": "again"}
QUANTIZED = ("import", "export")
"""What holds weights as `model.quantization` says."""

COPIES = 3
LIMIT = 1e9


def config_of(model: str, gigabytes: float) -> dict[str, Any]:
    """The config.json of at least so many gigabytes."""
    make, sizes, _ = MODELS[model]
    one, two = (make("bfloat16", **sizes, num_hidden_layers=layers) for layers in (2, 3))
    small, large = (synthetic.nbytes(synthetic.tensors_of(c, "bfloat16")) for c in (one, two))
    layers = 2 + max(0, -(-int(gigabytes * 1e9 - small) // (large - small)))
    return one | {"num_hidden_layers": layers}


# ---- In the process that is measured


def measure(task: str, folder: Path, quantization: str | None) -> dict[str, Any]:
    """Run one task in this process, and say what it took."""
    import jax
    import jax.numpy as jnp

    from dsjax.export import command as export  # noqa: F401  (their memory is the libraries')

    jnp.zeros(8).block_until_ready()
    baseline = machine.resident_bytes()
    if task in QUANTIZED:
        config = _run_config(folder, quantization)
        return {"import": _import, "export": _export}[task](folder, baseline, jax, config)
    return {"to-flax": _to_flax, "to-hf": _to_hf}[task](folder, baseline)


def _figures(memory: Any, baseline: int, arrays: int) -> dict[str, Any]:
    return {
        "seconds": memory.seconds,
        "cpu_seconds": memory.cpu_seconds,
        "baseline_bytes": baseline,
        "array_bytes": arrays,
        "above_bytes": max(memory.peak, memory.process_peak) - baseline - arrays,
        "above_sampled_bytes": memory.peak - baseline - arrays,
    }


def _run_config(folder: Path, quantization: str | None) -> Any:
    from dsjax.config import RunConfig

    kind = json.loads((folder / "model" / "config.json").read_text())["model_type"]
    sections = {
        "model": {"path": str(folder / "model"), "quantization": quantization},
        "adapter": {"peft_type": "LORA", "r": 16, "target_modules": MODELS[kind][2]},
        "data": {"train": ["none"]},
        "export": {"min_kept": None},  # random numbers: what bfloat16 keeps of them says nothing
        "output_dir": str(folder / "run"),
    }
    return RunConfig.model_validate(sections)


def _load(config: Any, jax: Any) -> tuple[Any, dict, dict]:
    from dsjax.training.setup import assemble, load_frozen, load_trainable

    setup = assemble(config)
    frozen = load_frozen(setup, 0)
    trainable = load_trainable(setup, frozen, 0)
    jax.block_until_ready((frozen, trainable))
    return setup, frozen, trainable


def _nbytes(*groups: Mapping[str, Any]) -> int:
    return sum(array.nbytes for group in groups for array in group.values())


def _import(folder: Path, baseline: int, jax: Any, config: Any) -> dict[str, Any]:
    with machine.PeakMemory() as memory:
        _, frozen, trainable = _load(config, jax)
    return _figures(memory, baseline, _nbytes(frozen, trainable))


def _export(folder: Path, baseline: int, jax: Any, config: Any) -> dict[str, Any]:
    from dsjax.export.folder import Output
    from dsjax.export.run import Trained, export_trained

    setup, frozen, trainable = _load(config, jax)
    for path, array in trainable.items():
        if path.endswith("lora_B"):
            trainable[path] = array + 0.01
    arrays = _nbytes(frozen, trainable)
    output = Output(config, "merged", 1, {}, {}, folder / OUTPUTS["export"])
    with machine.PeakMemory() as memory:
        export_trained(output, Trained(setup, trainable, frozen))
    return _figures(memory, baseline, arrays)


def _to_flax(folder: Path, baseline: int) -> dict[str, Any]:
    from dsjax.weights.convert import to_flax

    with machine.PeakMemory() as memory:
        to_flax(str(folder / "model"), str(folder / OUTPUTS["to-flax"]))
    return _figures(memory, baseline, _weights(folder / "model"))


def _to_hf(folder: Path, baseline: int) -> dict[str, Any]:
    from dsjax.weights.convert import to_hf

    with machine.PeakMemory() as memory:
        to_hf(str(folder / "flax"), str(folder / OUTPUTS["to-hf"]))
    return _figures(memory, baseline, 0)


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ---- In the process that asks


def in_process(task: str, folder: Path, quantization: str | None) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    words = [sys.executable, __file__, "--task", task, "--folder", str(folder)]
    words += [] if quantization is None else ["--quantization", quantization]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def plain_copy(folder: Path) -> tuple[float, float]:
    """Seconds that `cp` takes for the same files, written through to the disk; of the processor."""
    target = folder / "copy"
    began, cpu_began = time.perf_counter(), _cpu_of_children()
    subprocess.run(["cp", "-r", folder / "model", target], check=True)
    subprocess.run(["sync", *target.glob("*.safetensors")], check=True)
    seconds, cpu_seconds = time.perf_counter() - began, _cpu_of_children() - cpu_began
    shutil.rmtree(target)
    return seconds, cpu_seconds


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(folder: Path, repeats: int, quantization: str | None) -> dict[str, Any]:
    """Measure `cp`, then every task `repeats` times; times are medians, memory is the highest."""
    chosen = ("import", *OUTPUTS) if quantization is None else QUANTIZED
    tasks: dict[str, list[dict[str, Any]]] = {task: [] for task in chosen}
    copies = [plain_copy(folder) for _ in range(COPIES)]
    for repeat in range(repeats):
        for task, rounds in tasks.items():
            rounds.append(in_process(task, folder, quantization))
            print(f"{task} {repeat + 1}/{repeats}: {rounds[-1]}", file=sys.stderr)
        if "to-hf" in tasks:
            _check_identical(folder / "model", folder / OUTPUTS["to-hf"])
        for name in OUTPUTS.values():
            shutil.rmtree(folder / name, ignore_errors=True)
    size = _weights(folder / "model")
    summary = {
        task: {
            "seconds": statistics.median(r["seconds"] for r in rounds),
            "megabytes_per_second": size / 1e6 / statistics.median(r["seconds"] for r in rounds),
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in rounds),
            "array_bytes": rounds[0]["array_bytes"],
            "above_arrays_bytes": max(r["above_bytes"] for r in rounds),
            "rounds": rounds,
        }
        for task, rounds in tasks.items()
    }
    copy, cpu_of_copy = (statistics.median(values) for values in zip(*copies, strict=True))
    return {
        "checkpoint_bytes": size,
        "cp": {
            "seconds": copy,
            "megabytes_per_second": size / 1e6 / copy,
            "cpu_seconds": cpu_of_copy,
            "rounds": copies,
        },
        **summary,
    }


def _check_identical(source: Path, again: Path) -> None:
    """What went to our form and back is the same bytes."""
    for file in sorted(source.iterdir()):
        if not filecmp.cmp(file, again / file.name, shallow=False):
            raise RuntimeError(f"{file.name} differs after to-flax and to-hf")


def report(results: Mapping[str, Any]) -> str:
    """The table of a result."""
    lines = [
        "| | seconds | MB/s | of cp's | CPU seconds | arrays held (GB) | memory above them (GB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in [task for task in ("cp", "import", *OUTPUTS) if task in results]:
        r = results[task]
        held = f"{r['array_bytes'] / 1e9:.2f}" if "array_bytes" in r else ""
        above = f"{r['above_arrays_bytes'] / 1e9:.2f}" if "above_arrays_bytes" in r else ""
        of_copy = results["cp"]["seconds"] / r["seconds"]
        lines.append(
            f"| {task} | {r['seconds']:.1f} | {r['megabytes_per_second']:.0f} | {of_copy:.2f} "
            f"| {r['cpu_seconds']:.1f} | {held} | {above} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Make the checkpoint, measure, write the result; 1 if memory goes beyond the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama", help="llama (default) or V3")
    parser.add_argument("--gigabytes", type=float, default=6, help="least size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=3, help="times that each task runs")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--task", choices=("import", *OUTPUTS), help=argparse.SUPPRESS)
    parser.add_argument("--quantization", choices=("nf4", "int8", "fp8"))
    words = parser.parse_args()
    if words.task:
        print(json.dumps(measure(words.task, words.folder, words.quantization)))
        return 0
    described = machine.describe()
    with tempfile.TemporaryDirectory(dir=words.folder, prefix="dsjax-import-export-") as name:
        folder = Path(name)
        config = config_of(words.model, words.gigabytes)
        synthetic.write_checkpoint(folder / "model", config, "bfloat16")
        results = run(folder, words.repeats, words.quantization)
    command = (
        f"python benchmarks/import_export.py --model {words.model} "
        f"--gigabytes {words.gigabytes:g} --repeats {words.repeats}"
    ) + (f" --quantization {words.quantization}" if words.quantization else "")
    name = "_".join(filter(None, ("import_export", words.model, words.quantization)))
    out = words.out or RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command, "machine": described, "results": results}, indent=2)
    out.write_text(text + "\n")
    print(report(results))
    tasks = [task for task in ("import", *OUTPUTS) if task in results]
    above = {task: results[task]["above_arrays_bytes"] for task in tasks}
    over = {task: value for task, value in above.items() if value >= LIMIT}
    print(f"over the limit of 1 GB: {', '.join(over)}" if over else "all within 1 GB")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
