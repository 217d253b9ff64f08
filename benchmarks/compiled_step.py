# SPDX-License-Identifier: Apache-2.0
"""What the LoRA step of a 7B shape moves on an H100, read from the compiler's text: no GPU.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/compiled_step.py [--layers 16] [--json]

In: nothing; 4 rows of 2,048 tokens in one pass, all-linear r 16, no remat, as in `gpu_steps`. Out:
for a step, and for one layer of it, how many kernels of each kind run and how many bytes they read
and write. Needs dsjax[cuda].

How it counts. Every instruction of the optimised text that is a kernel or a copy is counted as
often as the loops around it run; of attention's branches the one for whole rows (true, or last of
the list) is counted, the others are not. It reads its operands and writes its results, but

- of an operand that a fusion only takes a dynamic-slice of, that slice (from jax 0.12 on a product
  reads a layer's weight where it lies in its stack: a fusion of the two);
- of an array that a fusion updates in place, the update, written once.

Kinds: `copies out of stacks` are fusions and instructions that do nothing but take a dynamic-slice;
`copies beside kernels` are those, and stores, that jax 0.12 starts early and awaits late;
`stores into stacks` are those that end in a dynamic-update-slice, with all that they read; small
products have a dimension of 64 or less, which is LoRA's rank; what is left is element by element or
a reduction. All products are cuBLAS calls here (`xla_gpu_enable_triton_gemm` off): without a device
the compiler cannot time Triton's against them, and would take Triton's for all. On a card some
small products are fused with their neighbours, so that element-wise bytes are at most these. Not
done here: times, which need a card (`gpu_steps`).
"""

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import synthetic  # noqa: E402

ROWS, LENGTH, RANK = 4, 2048, 16
SMALL = 64
"""A product with a dimension of at most this is LoRA's."""

KINDS = (
    "copies out of stacks",
    "copies beside kernels",
    "stores into stacks",
    "element-wise",
    "small products",
    "large products",
    "attention",
)
_ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "iota",
    "fusion-done",
}
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: its own.
        op: what it does.
        arrays: dtype and shape of its results.
        operands: their names.
        line: everything.
        root: whether the computation returns it.
    """

    name: str
    op: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    line: str
    root: bool

    @property
    def nbytes(self) -> int:
        """Of its results, without a product's workspace."""
        return sum(
            math.prod(shape) * _ITEMSIZE.get(dtype, 4)
            for dtype, shape in self.arrays
            if not (self.op == "custom-call" and dtype in ("s8", "u8"))
        )

    def called(self, word: str) -> list[str]:
        """Computations that it names after a word."""
        found = re.search(rf"\b{word}=\{{?((?:%[\w.\-]+(?:, )?)+)", self.line)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []


Computations = dict[str, dict[str, Instruction]]


@dataclass(frozen=True)
class Run:
    """A kernel or a copy: its kind, bytes that it reads and writes, how often, in which loop."""

    kind: str
    nbytes: int
    times: int
    trips: tuple[int, ...]
    what: str


def read(text: str) -> tuple[str, Computations]:
    """The computation that a program starts with, and all of them."""
    entry, current = "", ""
    found: Computations = {}
    for line in text.splitlines():
        head = None if line.startswith(" ") else _HEAD.match(line)
        if head:
            current = head[2]
            found[current] = {}
            entry = current if head[1] else entry
        one = _LINE.match(line)
        if one and current:
            arrays = tuple(
                (dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in _ARRAY.findall(one[3])
            )
            operands = tuple(re.findall(r"%([\w.\-]+)", one[5].split(")")[0]))
            found[current][one[2]] = Instruction(
                one[2], one[4], arrays, operands, line, bool(one[1])
            )
    return entry, found


def runs(all_of: Computations, name: str, trips: tuple[int, ...] = ()) -> Iterator[Run]:
    """Every kernel that a computation runs."""
    for one in all_of[name].values():
        if one.op == "while":
            count = _TRIPS.search(one.line)
            inner = (*trips, int(count[1]) if count else 1)
            yield from runs(all_of, one.called("body")[0], inner)
        elif one.op == "conditional":
            branches = one.called("true_computation") or one.called("branch_computations")
            yield from runs(all_of, branches[-1], trips)
        elif one.op == "call":
            yield from runs(all_of, one.called("to_apply")[0], trips)
        elif one.op not in _FREE:
            kind, nbytes = _cost(all_of, all_of[name], one)
            yield Run(kind, nbytes, math.prod(trips), trips, f"{one.op} {one.arrays}")


def _cost(
    all_of: Computations, around: dict[str, Instruction], one: Instruction
) -> tuple[str, int]:
    """Kind and bytes of one instruction."""
    operands = [around[name] for name in one.operands]
    if one.op == "custom-call":
        shapes = [shape for o in (one, *operands) for _, shape in o.arrays if len(shape) == 2]
        moved = one.nbytes + sum(o.nbytes for o in operands)
        if "cudnn" in one.line:
            return "attention", moved
        small = any(min(shape) <= SMALL for shape in shapes)
        return ("small products" if small else "large products"), moved
    if one.op == "fusion-start":
        kind, moved = _fusion_cost(all_of[one.called("calls")[0]])
        return (kind if kind == "element-wise" else KINDS[1]), moved
    if one.op == "fusion":
        body = all_of[one.called("calls")[0]]
        inside = [i for i in body.values() if i.op == "custom-call"]
        return _cost(all_of, body, inside[0]) if inside else _fusion_cost(body)
    if one.op == "dynamic-slice":
        return KINDS[0], 2 * one.nbytes
    return "element-wise", one.nbytes + sum(o.nbytes for o in operands)


def _fusion_cost(body: dict[str, Instruction]) -> tuple[str, int]:
    """Kind and bytes of a fusion: what it reads of each parameter, what it writes."""
    work = [i for i in body.values() if i.op not in _FREE and i.nbytes > 64]
    slices = [i for i in work if i.op == "dynamic-slice"]
    updates = [i for i in work if i.op == "dynamic-update-slice"]
    if slices and all(i.op in ("dynamic-slice", "copy") for i in work):
        return KINDS[0], 2 * sum(i.nbytes for i in slices)
    updated = {_origin(body, i.operands[0]) for i in updates}
    read = sum(
        _read_of(body, i) for i in body.values() if i.op == "parameter" and i.name not in updated
    )
    written = sum(i.nbytes for i in body.values() if i.root)
    for i in updates:
        written += body[i.operands[1]].nbytes - i.nbytes
    return (KINDS[2] if updates else "element-wise"), read + written


def _origin(body: dict[str, Instruction], name: str) -> str:
    """What an instruction is another view of."""
    while body[name].op == "bitcast":
        name = body[name].operands[0]
    return name


def _read_of(body: dict[str, Instruction], parameter: Instruction) -> int:
    """Bytes that a fusion reads of a parameter: its slices, where it reads nothing else of it."""
    users = [i for i in body.values() if parameter.name in i.operands]
    if users and all(i.op == "dynamic-slice" for i in users):
        return min(parameter.nbytes, sum(i.nbytes for i in users))
    return parameter.nbytes


# ---- The step, and the table


def compile_step(layers: int) -> tuple[str, dict[str, float]]:
    """The optimised text of the step, seconds to compile it, and its peak of memory in GiB."""
    from dsjax.config import RunConfig
    from dsjax.distributed.compiled import memory_of
    from dsjax.plan.plan import prepare
    from dsjax.plan.topologies import open_topology
    from dsjax.training.step import lower_train_step

    topology = open_topology("h100:1")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_model(layers)))
        _, step = prepare(RunConfig.model_validate(_sections(folder)), topology)
    lowered = lower_train_step(step, ROWS, LENGTH)
    options = topology.compiler_options | {"xla_gpu_enable_triton_gemm": False}
    began = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - began
    peak = memory_of(compiled, "cuda").peak / 2**30
    return compiled.as_text() or "", {"compile_seconds": seconds, "peak_gib": peak}


def _model(layers: int) -> dict[str, Any]:
    sizes = {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    return synthetic.llama_config("bfloat16", **sizes, tie_word_embeddings=False)


def _sections(folder: str) -> dict[str, Any]:
    return {
        "model": {"path": folder, "dtype": "bfloat16"},
        "adapter": {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK},
        "data": {"train": ["none"], "max_length": LENGTH},
        "optimizer": {"learning_rate": 1e-4, "lr_scheduler_type": "constant"},
        "training": {
            "batch_size": ROWS,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": "none",
        },
        "output_dir": "none",
    }


def table(text: str, layers: int) -> dict[str, dict[str, float]]:
    """By kind: kernels and bytes of a step, and of a layer of its scanned stack."""
    entry, all_of = read(text)
    sums: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in KINDS}
    for run in runs(all_of, entry):
        one = sums[run.kind]
        one["kernels a step"] += run.times
        one["GB a step"] += run.times * run.nbytes / 1e9
        if layers in run.trips:
            one["kernels a layer"] += run.times / layers
            one["GB a layer"] += run.times * run.nbytes / 1e9 / layers
    return {kind: dict(one) for kind, one in sums.items()}


def main() -> None:
    """Print the table, or all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--text", type=Path, help="read this compiled text, compile nothing")
    words = parser.parse_args()
    told: dict[str, float] = {}
    if words.text is None:
        text, told = compile_step(words.layers)
    else:
        text = words.text.read_text()
    found = table(text, words.layers)
    if words.json:
        print(json.dumps(told | {"layers": words.layers, "kinds": found}, indent=2))
        return
    names = ("kernels a step", "GB a step", "kernels a layer", "GB a layer")
    print(f"{'':22}" + "".join(f"{name:>17}" for name in names))
    for kind, one in found.items():
        print(f"{kind:22}" + "".join(f"{one.get(name, 0):17,.2f}" for name in names))
    total = {name: sum(one.get(name, 0) for one in found.values()) for name in names}
    print(f"{'all':22}" + "".join(f"{total[name]:17,.2f}" for name in names))
    print("  ".join(f"{name} {value:.1f}" for name, value in told.items()))


if __name__ == "__main__":
    main()
