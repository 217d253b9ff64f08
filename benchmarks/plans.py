# SPDX-License-Identifier: Apache-2.0
"""Do the recipes fit? Every plan of docs/plans.md, made by the platforms' own compilers.

    python benchmarks/plans.py [--cuda-python PATH] [--only WORD]

Writes docs/plans.md, and the plans in the heads of configs/*.yaml. Each plan is a process of its
own, one after the other; its time and its memory on this machine stand beside it. GPU plans need an
environment with dsjax[cuda]: its interpreter is `--cuda-python`. What is left out, for want of one
or by `--only`, stays as it was. Plans need neither an accelerator nor weights: config.json of each
model is in tests/model_configs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/plans.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from quickstart_world import CONFIG  # noqa: E402

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
    (
        "The same recipe, 131,072 tokens, their rows divided over 4 chips",
        "r1_distill_llama_8b_lora",
        "v5p:2x2x1",
        [*"mesh.fsdp=1 mesh.sequence=4 data.max_length=131072 training.batch_size=1".split()],
    ),
    (
        "The same recipe, 32,768 tokens, their rows divided over 8 H100",
        "r1_distill_llama_8b_lora",
        "h100:8",
        [*"mesh.fsdp=1 mesh.sequence=8 data.max_length=32768 training.batch_size=1".split()],
    ),
    ("DeepSeek-V2-Lite, LoRA, one H100", "deepseek_v2_lite_lora", "h100:1", []),
    ("DeepSeek-LLM-7B, full training, 8 H100", "deepseek_llm_7b_full", "h100:8", []),
    ("DeepSeek-LLM-67B, LoRA, 8 H100", "deepseek_llm_67b_lora", "h100:8", []),
    ("DeepSeek-V2, LoRA, 8 H200", "deepseek_v2_lora", "h200:8", []),
    ("DeepSeek-Coder-6.7B, LoRA, v5e-8", "deepseek_coder_6.7b_lora", "v5e:2x4", []),
    ("DeepSeek-Coder-6.7B, LoRA, one A100", "deepseek_coder_6.7b_lora", "a100-40gb:1", []),
    ("R1-Distill-Qwen-7B, LoRA, v5e-8", "r1_distill_qwen_7b_lora", "v5e:2x4", []),
    ("R1-Distill-Qwen-7B, LoRA, one A100", "r1_distill_qwen_7b_lora", "a100-40gb:1", []),
    ("R1-Distill-Llama-8B, LoRA, v5e-8", "r1_distill_llama_8b_lora", "v5e:2x4", []),
    ("R1-Distill-Llama-8B, LoRA, one A100", "r1_distill_llama_8b_lora", "a100-40gb:1", []),
    ("DeepSeek-R1, LoRA over NF4, 8 chips of v5p", "deepseek_r1_qlora", "v5p:2x2x2", []),
    ("The same recipe, one node of 8 H100", "deepseek_r1_qlora", "h100:8", []),
    (
        "DeepSeek-R1, LoRA over its FP8 weights, 16 chips of v5p",
        "deepseek_r1_lora",
        "v5p:2x2x4",
        ["model.quantization=fp8"],
    ),
    (
        "The same recipe, one node of 8 H200",
        "deepseek_r1_lora",
        "h200:8",
        ["model.quantization=fp8", "training.batch_size=32"],
    ),
    ("R1-Distill-Llama-8B, QLoRA, one chip of v5e", "r1_distill_llama_8b_qlora", "v5e:1x1", []),
    ("The same recipe, one L4", "r1_distill_llama_8b_qlora", "l4:1", []),
    ("DeepSeek-V2-Lite, QLoRA, one L4", "deepseek_v2_lite_qlora", "l4:1", []),
    ("Quickstart, full training, a CPU", "quickstart_pretrain", "cpu:1", []),
    ("Quickstart, LoRA, a CPU", "quickstart", "cpu:1", []),
]
"""Title, recipe, topology, overrides."""

EVALUATED = "data.eval=rows.jsonl"
"""On every command line, so that a plan holds the evaluation too; plans read no rows."""

HEAD = "# Plans, by the platforms' compilers, nothing measured (docs/plans.md):\n"


def main() -> int:
    """Make the plans and write the page and the heads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda-python")
    parser.add_argument("--only", default="")
    words = parser.parse_args()
    sections = read_sections()
    here = machine.describe()
    head = _HEAD.format(cpu=here["cpu"], cores=here["cores"], gib=here["memory_gib"])
    for title, recipe, topology, overrides in PLANS:
        on_gpu = not topology.startswith(("cpu", "v"))
        python = words.cuda_python if on_gpu else sys.executable
        if python is not None and words.only in f"{recipe} {topology}":
            sections[title] = _section(python, recipe, topology, overrides)
            known = [(title, sections[title]) for title, *_ in PLANS if title in sections]
            PAGE.write_text(head + "".join(f"\n## {title}\n\n{text}" for title, text in known))
    for recipe in {plan[1] for plan in PLANS}:
        _write_head(ROOT / f"configs/{recipe}.yaml", sections)
    return 0


def read_sections() -> dict[str, str]:
    """The page as it is: title -> text of the plan."""
    parts = PAGE.read_text().split("\n## ")[1:]
    return {title: text for title, _, text in (part.partition("\n\n") for part in parts)}


def head_lines(recipe: str, sections: dict[str, str]) -> list[str]:
    """What the head of a recipe says of its plans."""
    lines = []
    for title, name, topology, overrides in PLANS:
        if name == recipe and title in sections:
            text = sections[title]
            verdict = re.search(r"^(fits|does not fit) on \S+: (.*)$", text, re.M)
            peak = re.search(r"^  peak +([\d.]+ GiB)", text, re.M)
            room = re.search(r"^memory of a device, of ([\d.]+ GiB)", text, re.M)
            speed = re.search(r"^at most ([\d,]+ tokens/s)", text, re.M)
            assert verdict and peak and room, title
            lines.append(f"#   --topology {' '.join([topology, *overrides])}")
            lines.append(f"#     {verdict[2]}, {peak[1]} of {room[1]} each: {verdict[1]}")
            lines[-1] += f"; at most {speed[1]}" if speed else ""
    return lines


def _write_head(recipe: Path, sections: dict[str, str]) -> None:
    """Put the lines where those of last time are."""
    before, head, after = recipe.read_text().partition(HEAD)
    assert head, f"{recipe.name} has no line {HEAD}"
    rest = re.sub(r"\A(#   .*\n)*", "", after)
    lines = head_lines(recipe.stem, sections)
    recipe.write_text(before + HEAD + "".join(f"{line}\n" for line in lines) + rest)


def _section(python: str, recipe: str, topology: str, overrides: list[str]) -> str:
    command = ["python", "-m", "dsjax.plan", "--config", f"configs/{recipe}.yaml"]
    command += ["--topology", topology, *overrides, EVALUATED]
    print(" ".join(command), file=sys.stderr, flush=True)
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        tempfile.TemporaryDirectory() as folder,
    ):
        local = f"model.path={_model(recipe, Path(folder))}"
        words = [python, *command[1:], local]
        process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        err.seek(0)
        text = out.read()
        if status:
            raise SystemExit(f"{' '.join(command)} failed:\n{err.read()[-2000:]}")
    seconds, gigabytes = time.monotonic() - began, usage.ru_maxrss / 1e6
    print(text.split("\n")[0], f"{seconds:.0f} s", file=sys.stderr, flush=True)
    return (
        f"```\n{' '.join(command)}\n```\n\n```\n{text.rstrip()}\n```\n\n"
        f"The command took {seconds:.0f} s and at most {gigabytes:.1f} GB of this machine's "
        f"memory, with jax {_jax_of(python)}.\n"
    )


def _jax_of(python: str) -> str:
    """Version of jax in an environment."""
    asked = "import importlib.metadata; print(importlib.metadata.version('jax'))"
    return subprocess.run([python, "-c", asked], capture_output=True, text=True).stdout.strip()


def _model(recipe: str, folder: Path) -> Path:
    """A directory with the config.json of the recipe's model."""
    if recipe.startswith("quickstart"):
        (folder / "config.json").write_text(json.dumps(CONFIG))
        return folder
    return ROOT / "tests/model_configs" / re.sub("_(lora|qlora|full)$", "", recipe)


_HEAD = """# Plans

Whether a run fits is asked of the platform's own compiler, which needs neither the devices nor the
weights: `python -m dsjax.plan` compiles the very step that training runs, for a slice that is not
there. Written by `python benchmarks/plans.py` without an accelerator, the last of them on {cores}
cores of an {cpu} with {gib} GiB of memory. The commands below read
the model's config.json from the hub, the script from `tests/model_configs`. Seconds count whatever
else that machine did meanwhile.

**Nothing here ran on a TPU or a GPU.** Memory is what the compilers assign. Times are a roofline:
every unit at its published peak, everything overlapped, so a real step takes longer; see
[throughput.md](throughput.md). GPU plans count on 92 % of a GPU's memory, which training asks for
(`XLA_PYTHON_CLIENT_MEM_FRACTION`), and on Hopper are without the workspace of cuDNN's attention
([benchmarks.md](benchmarks.md)). `evaluation's peak` stands where the command names `data.eval`,
whose rows a plan does not read: the evaluation is compiled too, and has to fit as the step does.

`remat` is the policy that a run there takes: where the recipe names none, the one that computes
least again and still fits (`training.gradient_checkpointing: auto`). So a plan may leave little
room; where that is too little after all, the run, which compiles the same step, goes on to the next
policy.

`--json` prints a plan for programs, `--verbose` every array with its sharding, `--search` finds the
largest batch and the cheapest remat policy that fit, `--suggest` the smallest slices.
"""

if __name__ == "__main__":
    sys.exit(main())
