# SPDX-License-Identifier: Apache-2.0
"""One GPU in minutes: kernels, steps against PEFT, planned and used memory, where time goes.

    python benchmarks/gpu.py [--only kernels 7b ...] [--out FILE] [--minutes 6]

Each part runs in a process of its own under a limit of time, so that one that fails or hangs leaves
the others their figures; the result file is written after each. Parts:

    ceiling    the largest matrix product's rate, and a copy's, of this card
    kernels    attention: the kernel that is chosen, that for Triton, and jax.nn's cuDNN, with the
               error against float32
    7b         LoRA step of a llama-7B shape of 16 layers: ours, PEFT eager, PEFT compiled
    7b_trace   the same step alone, with its kernels
    qwen7b     LoRA step of Qwen2.5-7B's shape, 2 rows of 4,096, as little as fits computed again
    v2lite     LoRA step of V2-Lite's shape (27 layers, 64 experts), 8 rows of 2,048, full remat
    quickstart `tools/quickstart.py`, with what was compiled and for how long

Weights are random. Counting: `needed` is what the loss and its gradients take (docs/throughput.md),
`4n` is 4 FLOPs a parameter and token, as others count LoRA. Out: JSON, and tables.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_steps  # noqa: E402
import machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
WARM, TIMED = 3, 10


def seconds_of(call: Callable[[], Any], warm: int = WARM, timed: int = TIMED) -> float:
    """The mean time of a call on the device, after some that do not count."""
    import jax

    for _ in range(warm):
        out = call()
    jax.block_until_ready(out)
    began = time.perf_counter()
    for _ in range(timed):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / timed


# ---- Parts: each returns what its line of the result holds


def ceiling() -> dict[str, float]:
    """TFLOP/s of a bf16 product of 8192 x 8192, and TB/s of a copy, bytes read and written."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    product, big = jax.jit(lambda a, b: a @ b), jnp.ones((2**29,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return {
        "matmul_tflops": 2 * 8192**3 / seconds_of(lambda: product(a, b)) / 1e12,
        "copy_tb_per_second": 2 * big.nbytes / seconds_of(lambda: copy(big)) / 1e12,
    }


ATTENTION = {
    "7B, 32 heads of 128": (4, 2048, 32, 32, 128, 128),
    "Qwen2.5-7B, 28/4 heads of 128": (2, 4096, 28, 4, 128, 128),
    "V2-Lite, 16 heads of 192/128": (8, 2048, 16, 16, 192, 128),
    "V3, 128 heads of 192/128": (1, 2048, 128, 128, 192, 128),
}
"""Name -> B, T, N, K, H, V."""


def kernels() -> list[dict[str, Any]]:
    """Attention of each shape, whole rows and five segments a row; printed as they come."""
    done = []
    for name, shape in ATTENTION.items():
        for segments in (1, 5):
            # jax.nn's wants heads of one size.
            for kernel in ("ours", "triton", *(("jax.nn",) if shape[4] == shape[5] else ())):
                case = {"case": name, "segments": segments, "kernel": kernel}
                done.append(case | _attention(shape, segments, kernel))
                print(json.dumps(done), flush=True)
    return done


def _attention(shape: tuple[int, ...], segments: int, kernel: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    batch, length, heads, kv_heads, size, value_size = shape
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(heads, size), (kv_heads, size), (kv_heads, value_size), (heads, value_size)]
    q, k, v, seed = (
        jax.random.normal(key, (batch, length, *one), jnp.bfloat16)
        for key, one in zip(keys, sizes, strict=True)
    )
    segment = jnp.broadcast_to(jnp.arange(length) * segments // length + 1, (batch, length))
    dot_product_attention = _kernel(kernel, segment, size**-0.5)
    backward = jax.jit(lambda q, k, v, seed: jax.vjp(dot_product_attention, q, k, v)[1](seed))
    forward = jax.jit(dot_product_attention)
    pairs = length * (length + 1) / 2 / segments  # about: of every segment its causal half
    flops = 2 * batch * heads * pairs * (size + value_size)
    ahead, both = seconds_of(lambda: forward(q, k, v)), seconds_of(lambda: backward(q, k, v, seed))
    exact = _kernel("plain", segment[:1], size**-0.5)
    wide = [x[:1].astype(jnp.float32) for x in (q, k, v, seed)]
    exact_both = jax.jit(lambda q, k, v, seed: (exact(q, k, v), *jax.vjp(exact, q, k, v)[1](seed)))
    expected, found = exact_both(*wide), (forward(q, k, v), *backward(q, k, v, seed))
    errors = {
        f"error_{name}": float(jnp.linalg.norm(one[:1] - other) / jnp.linalg.norm(other))
        for name, one, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True)
    }
    return {
        "forward_ms": ahead * 1e3,
        "forward_tflops": flops / ahead / 1e12,
        "forward_backward_ms": both * 1e3,
        "forward_backward_tflops": 3.5 * flops / both / 1e12,
        **errors,
    }


def _kernel(kernel: str, segment: Any, scale: float) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    from dsjax.models.ops.attention import Tokens, dot_product_attention, kernel_for
    from dsjax.models.ops.attention_cuda import attend_cuda

    if kernel == "ours":
        device = jax.devices()[0]

        def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            chosen = kernel_for(device, q.shape[3], v.shape[3])
            assert chosen is not None
            return chosen(q, k, v, segment, scale, "kernel")

        return ours
    if kernel == "triton":
        return lambda q, k, v: attend_cuda(q, k, v, segment, scale, "kernel")
    if kernel == "plain":
        positions = jnp.broadcast_to(jnp.arange(segment.shape[1]), segment.shape)
        tokens = Tokens(positions, segment)
        return lambda q, k, v: dot_product_attention(q, k, v, tokens, tokens, None, scale)
    whole = bool((segment == 1).all())
    mask = None if whole else (segment[:, None, :, None] == segment[:, None, None, :])
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=True, implementation="cudnn"
    )


def against_peft() -> dict[str, Any]:
    """`lora_vs_peft.py` on the 7B shape."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "benchmarks/lora_vs_peft.py"), "--out", str(out)]
        command += (
            "--rows 4 --length 2048 --steps 8 --rounds 1 --vocab 102400 --hidden 4096".split()
        )
        command += (
            "--ffn 11008 --layers 16 --heads 32 --kv-heads 32 --untied --policies none".split()
        )
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(done.stdout)
        assert done.returncode == 0
        return json.loads(out.read_text())["results"]


def quickstart() -> dict[str, Any]:
    """Seconds of the whole, and of what was compiled for longer than half a second."""
    environment = os.environ | {"JAX_LOG_COMPILES": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools/quickstart.py")],
            cwd=folder,
            env=environment | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - began
    text = done.stdout + done.stderr
    compiled = re.findall(r"Finished XLA compilation of (\S+) in ([\d.]+) sec", text)
    long = sorted(((float(t), name) for name, t in compiled if float(t) > 0.5), reverse=True)
    return {
        "exit_code": done.returncode,
        "seconds": seconds,
        "compilations": len(compiled),
        "compile_seconds": sum(float(t) for _, t in compiled),
        "longest": [[name, t] for t, name in long[:12]],
        "last_lines": done.stdout.splitlines()[-8:],
    }


PARTS: dict[str, tuple[Callable[[], Any], float]] = {
    "ceiling": (ceiling, 40),
    "kernels": (kernels, 100),
    "7b": (against_peft, 220),
    "7b_trace": (gpu_steps.llama_7b, 60),
    "qwen7b": (gpu_steps.qwen_7b, 80),
    "v2lite": (gpu_steps.v2_lite, 100),
    "quickstart": (quickstart, 150),
}
"""Part -> what it does, and its limit in seconds."""


def main() -> int:
    """Run the parts that are named, each by itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--minutes", type=float, default=6, help="begin no part after these")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.part:
        print(json.dumps(PARTS[words.part][0]()))
        return 0
    began = time.monotonic()
    result: dict[str, Any] = {"machine": machine.describe(), "gpu": _gpu(), "parts": {}}
    words.out.parent.mkdir(parents=True, exist_ok=True)
    for name in words.only:
        if time.monotonic() - began > 60 * words.minutes:
            result["parts"][name] = {"failed": "no time was left"}
            continue
        result["parts"][name] = _in_process(name)
        print(name, json.dumps(result["parts"][name], indent=1)[:3000], flush=True)
        words.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _in_process(name: str) -> dict[str, Any]:
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--part", name],
            capture_output=True,
            text=True,
            timeout=PARTS[name][1],
        )
    except subprocess.TimeoutExpired as error:
        told = (error.stderr or b"").decode(errors="replace")[-1500:]
        lines = (error.stdout or b"").decode().splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        failed = {"failed": f"not done after {PARTS[name][1]} s", "stderr": told}
        return failed | ({"figures": whole[-1]} if whole else {})
    seconds = time.monotonic() - began
    if done.returncode:
        return {
            "failed": f"exit {done.returncode}",
            "seconds": seconds,
            "stderr": done.stderr[-3000:],
        }
    return {"seconds": seconds, "figures": json.loads(done.stdout.splitlines()[-1])}


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "none"


if __name__ == "__main__":
    sys.exit(main())
