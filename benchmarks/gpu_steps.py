# SPDX-License-Identifier: Apache-2.0
"""The LoRA step of full-size shapes on one GPU, with random weights made on it: no file is written.

In: a shape. Out: tokens per second, FLOP/s by both rules of counting, planned and used memory, and
where the device's time goes, kernel by kernel. Not done here: peers (`lora_vs_peft`).
"""

import gzip
import json
import math
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import synthetic

ROOT = Path(__file__).resolve().parents[1]
RANK, STEPS = 16, 8

KERNELS = (
    ("matrix products", r"nvjet|cutlass|gemm|cublas|xmma|splitK"),
    ("attention", r"attention|fmha|sdpa|cudnn|_attend"),
    ("experts", r"grouped|gmm|ragged|_multiply_rows"),
    ("copies between arrays", r"memcpy|^copy|MemcpyD2D|Memcpy D2D"),
    ("stores into stacks", r"dynamic_update_slice"),
    ("reads from stacks", r"dynamic_slice"),
    ("sorts and gathers", r"sort|gather|scatter"),
    ("zeros", r"broadcast|memset|Memset"),
    ("element by element", r"fusion|loop_|input_|wrapped_"),
)
"""What a kernel counts as: the first pattern that its name matches."""


def llama_7b() -> dict[str, Any]:
    """A llama of 7B's layers, 16 of them: what `lora_vs_peft` compares; here with its trace."""
    sizes = {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    config = synthetic.llama_config("bfloat16", **sizes, tie_word_embeddings=False)
    return measure(config, rows=4, length=2048, remat="none", trace=True)


def qwen_7b() -> list[dict[str, Any]]:
    """Qwen2.5-7B's shape in the setting of the best published single-GPU figure."""
    file = ROOT / "tests/model_configs/r1_distill_qwen_7b/config.json"
    config, tried = json.loads(file.read_text()), []
    for remat in ("none", "dots", "names", "full"):
        tried.append(measure(config, rows=2, length=4096, remat=remat))
        if tried[-1]["fits"]:
            break
    return tried


def v2_lite() -> dict[str, Any]:
    """V2-Lite, LoRA on attention and on the dense and shared feed-forwards."""
    file = ROOT / "tests/model_configs/deepseek_v2_lite/config.json"
    return measure(json.loads(file.read_text()), rows=8, length=2048, remat="full", trace=True)


def measure(
    config: dict[str, Any], rows: int, length: int, remat: str, trace: bool = False
) -> dict[str, Any]:
    """Compile the real step of a run, run it, and read the device's memory."""
    import jax

    from dsjax.config import RunConfig
    from dsjax.distributed.compiled import memory_of
    from dsjax.training.flops import token_flops
    from dsjax.training.setup import assemble
    from dsjax.training.state import init_state, step_config
    from dsjax.training.step import lower_train_step

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        run = RunConfig.model_validate(_sections(folder, rows, length, remat))
        setup = assemble(run, weights=False)
    step = step_config(run, setup.partition, setup.mesh, 1000)
    began = time.perf_counter()
    compiled = lower_train_step(step, rows, length).compile()
    compile_seconds = time.perf_counter() - began
    planned = memory_of(compiled, jax.devices()[0].platform).peak
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", planned)
    plan = {"rows": rows, "length": length, "remat": remat, "planned_gib": planned / 2**30}
    if planned > limit:
        return plan | {"fits": False, "limit_gib": limit / 2**30}
    leaves = setup.partition.leaves
    frozen = {path: _random(path, leaves[path]) for path in setup.partition.frozen}
    trainable = {path: _random(path, leaves[path]) for path in setup.partition.trainable}
    state = init_state(trainable, step, 0)
    batch = _batch(rows, length, setup.model.config.vocab_size, setup.mesh)
    times, losses = [], []
    for _ in range(2 + STEPS):
        began = time.perf_counter()
        state, told = compiled(state, frozen, batch)
        losses.append(float(told.sums["loss"]) / float(told.sums["weight"]))
        times.append(time.perf_counter() - began)
    seconds = sorted(times[2:])[STEPS // 2]
    flops = token_flops(setup.model, setup.partition, length, remat)
    params = sum(math.prod(leaves[p].shape) for p in setup.partition.frozen)
    tokens = rows * length
    stats = jax.devices()[0].memory_stats() or {}
    figures = plan | {
        "fits": True,
        "parameters": params,
        "compile_seconds": compile_seconds,
        "step_seconds": seconds,
        "step_seconds_all": times,
        "losses": losses,
        "tokens_per_second": tokens / seconds,
        "needed_tflops": flops.needed * tokens / seconds / 1e12,
        "executed_tflops": flops.executed * tokens / seconds / 1e12,
        "4n_tflops": 4 * params * tokens / seconds / 1e12,
        "used_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
    }
    if trace:
        figures["trace"] = _trace(compiled, state, frozen, batch)
    assert state is not None
    return figures


def _sections(folder: str, rows: int, length: int, remat: str) -> dict[str, Any]:
    return {
        "model": {"path": folder, "dtype": "bfloat16"},
        "adapter": {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK},
        "data": {"train": ["none"], "max_length": length},
        "optimizer": {"learning_rate": 1e-4, "lr_scheduler_type": "constant"},
        "training": {"batch_size": rows, "gradient_checkpointing": remat},
        "output_dir": "none",
    }


def _random(path: str, leaf: Any) -> Any:
    """Normal numbers of 0.02; a norm's weights are ones."""
    import jax
    import jax.numpy as jnp

    shape, dtype = leaf.shape, leaf.dtype

    @jax.jit
    def make() -> jax.Array:
        if "norm" in path:
            return jnp.ones(shape, dtype)
        if len(shape) < 3:
            return 0.02 * jax.random.normal(jax.random.key(0), shape, dtype)
        # A layer at a time: random bits of a whole stack would take twice its memory.
        draw = lambda i: 0.02 * jax.random.normal(jax.random.key(i), shape[1:], dtype)  # noqa: E731
        return jax.lax.map(draw, jnp.arange(shape[0]))

    return make()


def _batch(rows: int, length: int, vocabulary: int, mesh: Any) -> Any:
    import numpy as np

    from dsjax.data import Batch
    from dsjax.training.evaluation import to_devices

    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length), np.int32)
    targets = np.concatenate([ids[:, 1:], np.zeros_like(ids[:, :1])], axis=1)
    weights = np.ones(ids.shape, np.float32)
    weights[:, -1] = 0
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape))
    return to_devices(Batch(ids, targets, weights, np.ones_like(ids), positions), mesh)


def _trace(compiled: Any, state: Any, frozen: Any, batch: Any, steps: int = 3) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, and its longest kernels by name."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, told = compiled(state, frozen, batch)
            told.grad_norm.block_until_ready()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return summary(events, steps)


def summary(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Sum a trace's device events; names differ in numbers only, which are taken out."""
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "GPU" in event["args"]["name"]
    }
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name"
        and event["pid"] in devices
        and event["args"]["name"].startswith("Stream")
    }
    by_name: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            by_name[event["name"]] += event["dur"] / 1e3 / steps
            counts[event["name"]] += 1
    kinds: Counter[str] = Counter()
    for name, spent in by_name.items():
        found = (kind for kind, pattern in KERNELS if re.search(pattern, name, re.I))
        kinds[next(found, "other")] += spent
    return {
        "ms_by_kind": dict(kinds.most_common()),
        "ms": sum(by_name.values()),
        "longest": [
            [name[:90], round(spent, 3), counts[name] // steps]
            for name, spent in by_name.most_common(40)
        ],
    }
