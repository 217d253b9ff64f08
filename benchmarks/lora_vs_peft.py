# SPDX-License-Identifier: Apache-2.0
"""Tokens per second and peak memory of a LoRA step: ours, and PEFT's on torch, on the same device.

    python benchmarks/lora_vs_peft.py [--rows 4] [--length 512] [--steps 5] ...

Both load the same synthetic checkpoint and train the same batch with LoRA on all linear maps, AdamW
and clipping, each in a process of its own, with and without gradient checkpointing. Ours is the
train step of `dsjax.train`; PEFT's is a plain torch loop with its defaults (eager, SDPA attention),
on CUDA with the fused AdamW, and there once more under torch.compile. The device is CUDA if both
see one (then in bfloat16), else the CPU (float32). The first losses must agree: all do the same
work.
Out: a table, and JSON under benchmarks/results.
"""

import argparse
import json
import os
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

RESULT = ROOT / "benchmarks" / "results" / "lora_vs_peft.json"
SIDES = {"cpu": ("dsjax", "peft"), "cuda": ("dsjax", "peft", "peft_compiled")}
REMAT = ("none", "full")
FIRST_LOSS_BOUND = {"float32": 1e-3, "bfloat16": 5e-2}
LEARNING_RATE = 1e-4


def _ids(words: argparse.Namespace) -> Any:
    import numpy as np

    shape = (words.rows, words.length)
    return np.random.default_rng(0).integers(0, words.vocab, shape, np.int32)


# ---- Ours


def measure_dsjax(words: argparse.Namespace) -> dict[str, Any]:
    """Time the real step on a real assembly."""
    import jax
    import numpy as np

    from dsjax.config import RunConfig
    from dsjax.data import Batch
    from dsjax.training.evaluation import to_devices
    from dsjax.training.setup import assemble, load_frozen, load_trainable
    from dsjax.training.state import abstract_state, init_state, step_config
    from dsjax.training.step import make_train_step

    jax.numpy.zeros(8).block_until_ready()
    with machine.PeakMemory() as memory:
        config = RunConfig.model_validate(_sections(words))
        setup = assemble(config)
        step = step_config(config, setup.partition, setup.mesh, 1000)
        frozen = load_frozen(setup, 0)
        state = init_state(load_trainable(setup, frozen, 0), step, 0)
        ids = _ids(words)
        targets = np.concatenate([ids[:, 1:], np.zeros_like(ids[:, :1])], axis=1)
        weights = np.ones(ids.shape, np.float32)
        weights[:, -1] = 0
        positions = np.broadcast_to(np.arange(words.length, dtype=np.int32), ids.shape)
        rows = Batch(ids, targets, weights, np.ones_like(ids), np.ascontiguousarray(positions))
        batch = to_devices(rows, setup.mesh)
        train_step = make_train_step(step, abstract_state(step))
        losses, times = [], []
        for _ in range(1 + words.steps):
            began = time.perf_counter()
            state, told = train_step(state, frozen, batch)
            losses.append(float(told.sums["loss"]) / float(told.sums["weight"]))
            times.append(time.perf_counter() - began)
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    return _figures(losses, times, memory, stats and stats["peak_bytes_in_use"])


def _sections(words: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"path": str(words.folder / "model"), "dtype": words.dtype},
        "adapter": {"peft_type": "LORA", "r": words.rank, "lora_alpha": 2 * words.rank},
        "data": {"train": ["none"], "max_length": words.length},
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
        "training": {"batch_size": words.rows, "gradient_checkpointing": words.remat},
        "output_dir": "none",
    }


# ---- PEFT


def measure_peft(words: argparse.Namespace) -> dict[str, Any]:
    """Time a torch step on the same numbers."""
    import peft
    import torch
    import transformers

    device = "cuda" if words.device == "cuda" else "cpu"
    torch.zeros(8, device=device)
    with machine.PeakMemory() as memory:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            words.folder / "model", dtype=getattr(torch, words.dtype)
        )
        torch.nn.Module.to(base, device)
        base.config.use_cache = False
        if words.remat == "full":
            base.gradient_checkpointing_enable({"use_reentrant": False})
        lora = peft.LoraConfig(
            r=words.rank,
            lora_alpha=2 * words.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(base, lora).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        fused = True if device == "cuda" else None
        optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, fused=fused)
        if words.side == "peft_compiled":
            model = torch.compile(model)
        ids = torch.as_tensor(_ids(words), dtype=torch.long, device=device)
        losses, times = [], []
        for _ in range(1 + words.steps):
            began = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return _figures(losses, times, memory, peak)


def _figures(
    losses: list[float], times: list[float], memory: machine.PeakMemory, device_peak: int | None
) -> dict[str, Any]:
    """The first step compiles, or warms up; it counts for neither side."""
    return {
        "losses": losses,
        "first_step_seconds": times[0],
        "step_seconds": times[1:],
        "peak_host_bytes": memory.process_peak,
        "peak_host_above_libraries_bytes": memory.process_peak - memory.before,
        "peak_device_bytes": device_peak,
    }


# ---- In the process that asks


def see_device() -> str:
    """`cuda` if both libraries see a CUDA device, else `cpu`."""
    sees = (
        "import jax; assert jax.default_backend() == 'gpu'",
        "import torch; assert torch.cuda.is_available()",
    )
    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
        for code in sees
    ]
    return "cuda" if all(found) else "cpu"


def in_process(side: str, remat: str, words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one side in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--remat", remat, "--folder", str(folder)]
    for name in ("rows", "length", "steps", "rank", "vocab", "device", "dtype"):
        command += [f"--{name}", str(getattr(words, name))]
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if words.device == "cpu" else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure both sides, in turns, so that a busy machine slows both."""
    results: dict[str, Any] = {}
    names = SIDES[words.device]
    for remat in words.policies:
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in names}
        for _ in range(words.rounds):
            for side in names:
                rounds[side].append(in_process(side, remat, words, folder))
                print(f"{remat} {side}: {rounds[side][-1]}", file=sys.stderr)
        _check_same_work(rounds, words.dtype)
        sides = {side: _summary(rounds[side], words) for side in names}
        results[remat] = sides | {f"dsjax / {peer}": _ratio(sides, peer) for peer in names[1:]}
    return results


def _ratio(sides: Mapping[str, dict[str, Any]], peer: str) -> dict[str, float]:
    keys = ("tokens_per_second", "best_tokens_per_second", "peak_bytes")
    return {key: sides["dsjax"][key] / sides[peer][key] for key in keys}


def _check_same_work(rounds: Mapping[str, list[dict[str, Any]]], dtype: str) -> None:
    first = {side: measured[0]["losses"][0] for side, measured in rounds.items()}
    if max(first.values()) - min(first.values()) > FIRST_LOSS_BOUND[dtype]:
        raise RuntimeError(f"the first losses differ, so the work does too: {first}")


def _summary(rounds: list[dict[str, Any]], words: argparse.Namespace) -> dict[str, Any]:
    times = [s for measured in rounds for s in measured["step_seconds"]]
    seconds = statistics.median(times)
    key = "peak_device_bytes" if words.device == "cuda" else "peak_host_bytes"
    return {
        "step_seconds": seconds,
        "best_step_seconds": min(times),
        "tokens_per_second": words.rows * words.length / seconds,
        "best_tokens_per_second": words.rows * words.length / min(times),
        "peak_bytes": max(measured[key] for measured in rounds),
        "rounds": rounds,
    }


def report(results: Mapping[str, Any]) -> str:
    """The table of a result."""
    lines = [
        "| checkpointing | side | tokens/s, median | tokens/s, best | peak memory (GB) |",
        "|---|---|---|---|---|",
    ]
    for remat, sides in results.items():
        for side, r in sides.items():
            ratio = side.startswith("dsjax /")
            speeds = (r["tokens_per_second"], r["best_tokens_per_second"])
            median, best = (f"{speed:.{2 if ratio else 1}f}" for speed in speeds)
            memory = r["peak_bytes"] / (1 if ratio else 1e9)
            lines.append(f"| {remat} | {side} | {median} | {best} | {memory:.2f} |")
    return "\n".join(lines)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"rows": 4, "length": 512, "steps": 5, "rounds": 2, "rank": 16, "vocab": 32000}
    shape = {"hidden": 768, "ffn": 2048, "layers": 12, "heads": 12, "kv-heads": 12}
    for name, default in (sizes | shape).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULT, help="result file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what both see")
    parser.add_argument("--dtype", choices=tuple(FIRST_LOSS_BOUND), help="default: by device")
    parser.add_argument("--policies", nargs="*", choices=REMAT, default=REMAT)
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--side", choices=SIDES["cuda"], help=argparse.SUPPRESS)
    parser.add_argument("--remat", choices=REMAT, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def _config(words: argparse.Namespace) -> dict[str, Any]:
    return synthetic.llama_config(
        words.dtype,
        vocab_size=words.vocab,
        hidden_size=words.hidden,
        intermediate_size=words.ffn,
        num_hidden_layers=words.layers,
        num_attention_heads=words.heads,
        num_key_value_heads=words.kv_heads,
        tie_word_embeddings=not words.untied,
    )


def main() -> int:
    """Measure both sides, write the result, print the table."""
    words = _arguments().parse_args()
    if words.side:
        measure = measure_dsjax if words.side == "dsjax" else measure_peft
        print(json.dumps(measure(words)))
        return 0
    described = machine.describe()
    words.device = words.device or see_device()
    words.dtype = words.dtype or ("bfloat16" if words.device == "cuda" else "float32")
    with tempfile.TemporaryDirectory(prefix="dsjax-lora-vs-peft-") as name:
        folder = Path(name)
        size = synthetic.write_checkpoint(folder / "model", _config(words), words.dtype)
        results = compare(words, folder)
    result = {
        "command": " ".join(["python benchmarks/lora_vs_peft.py", *sys.argv[1:]]),
        "machine": described,
        "settings": {k: v for k, v in vars(words).items() if isinstance(v, str | int)},
        "checkpoint_bytes": size,
        "results": results,
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(result, indent=2) + "\n")
    print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
