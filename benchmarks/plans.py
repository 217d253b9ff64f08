# SPDX-License-Identifier: Apache-2.0
"""Do the recipes fit? Every plan of docs/plans.md, made by the platforms' own compilers.

    python benchmarks/plans.py [--cuda-python PATH] [--only WORD]

Writes docs/plans.md. Each plan is a process of its own, one after the other; its time and its
memory on this machine stand beside it. GPU plans need an environment with dsjax[cuda]: its
interpreter is `--cuda-python`; without one they are left out. Plans need neither an accelerator nor
weights: config.json of each model is in tests/model_configs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]

PLANS: list[tuple[str, str, str, list[str]]] = [
    ("DeepSeek-R1, LoRA, 32 chips of v5p", "deepseek_r1_lora", "v5p:2x4x4", []),
    ("The same recipe, 64 chips", "deepseek_r1_lora", "v5p:4x4x4", []),
    ("The same recipe, 128 chips", "deepseek_r1_lora", "v5p:4x4x8", []),
    (
        "DeepSeek-V2-Lite, LoRA, v5e-8",
        "deepseek_v2_lite_lora",
        "v5e:2x4",
        ["mesh.expert=8", "mesh.fsdp=1"],
    ),
    ("DeepSeek-LLM-7B, full training, v5e-16", "deepseek_llm_7b_full", "v5e:4x4", []),
    ("DeepSeek-LLM-67B, LoRA, v5p-8", "deepseek_llm_67b_lora", "v5p:2x2x1", []),
    (
        "R1-Distill-Llama-8B, LoRA, 32,768 tokens, v5p-8",
        "r1_distill_llama_8b_lora",
        "v5p:2x2x1",
        ["data.max_length=32768"],
    ),
    ("DeepSeek-V2-Lite, LoRA, one H100", "deepseek_v2_lite_lora", "h100:1", []),
    ("DeepSeek-LLM-7B, full training, 8 H100", "deepseek_llm_7b_full", "h100:8", []),
    ("DeepSeek-LLM-67B, LoRA, 8 H100", "deepseek_llm_67b_lora", "h100:8", []),
]
"""Title, recipe, topology, overrides."""


def main() -> int:
    """Make every plan and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda-python")
    parser.add_argument("--only", default="")
    words = parser.parse_args()
    here = machine.describe()
    sections = []
    for title, recipe, topology, overrides in PLANS:
        on_gpu = not topology.startswith("v")
        python = words.cuda_python if on_gpu else sys.executable
        if python is not None and words.only in f"{recipe} {topology}":
            sections.append(_section(python, title, recipe, topology, overrides))
    head = _HEAD.format(cpu=here["cpu"], cores=here["cores"], gib=here["memory_gib"])
    (ROOT / "docs/plans.md").write_text(head + "".join(sections))
    return 0


def _section(python: str, title: str, recipe: str, topology: str, overrides: list[str]) -> str:
    command = ["python", "-m", "dsjax.plan", "--config", f"configs/{recipe}.yaml"]
    command += ["--topology", topology, *overrides]
    model = recipe.removesuffix("_lora").removesuffix("_full")
    local = [f"model.path={ROOT}/tests/model_configs/{model}"]
    print(" ".join(command), file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([python, *command[1:], *local], cwd=ROOT, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        err.seek(0)
        text = out.read()
        if status:
            raise SystemExit(f"{' '.join(command)} failed:\n{err.read()[-2000:]}")
    seconds, gigabytes = time.monotonic() - began, usage.ru_maxrss / 1e6
    print(text.split("\n")[0], f"{seconds:.0f} s", file=sys.stderr, flush=True)
    return (
        f"\n## {title}\n\n```\n{' '.join(command)}\n```\n\n```\n{text.rstrip()}\n```\n\n"
        f"The command took {seconds:.0f} s and at most {gigabytes:.1f} GB of this machine's "
        "memory.\n"
    )


_HEAD = """# Plans

Whether a run fits is asked of the platform's own compiler, which needs neither the devices nor the
weights: `python -m dsjax.plan` compiles the very step that training runs, for a slice that is not
there. Written by `python benchmarks/plans.py`, on a machine without an accelerator ({cores} cores
of an {cpu}, {gib} GiB of memory); the commands below read the model's config.json from the hub, the
script from `tests/model_configs`.

**Nothing here ran on a TPU or a GPU.** Memory is what the compilers assign. Times are a roofline:
every unit at its published peak, everything overlapped, so a real step takes longer; see
[throughput.md](throughput.md). GPU plans count on 92 % of a GPU's memory, which training asks for
(`XLA_PYTHON_CLIENT_MEM_FRACTION`).

`--json` prints a plan for programs, `--verbose` every array with its sharding, `--search` finds the
largest batch and the cheapest remat policy that fit, `--suggest` the smallest slices.
"""

if __name__ == "__main__":
    sys.exit(main())
