# SPDX-License-Identifier: Apache-2.0
"""How far `model.quantization` moves the logits of each family, on tiny random models.

    python benchmarks/quantization_error.py [--seeds 3]

In: nothing; models that tests/tiny.py draws, sizes multiples of 64, weights of a normal
distribution. Out: a table of |quantized - bfloat16| / |bfloat16| of the logits, the median over
tokens and the mean over seeds, and JSON under benchmarks/results. Random models have no outliers,
and errors add up otherwise in deep ones: this compares schemes; it says nothing of trained models.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import machine  # noqa: E402
import tiny  # noqa: E402

import dsjax  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "quantization_error.json"
PLAIN: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
LATENT = {
    **PLAIN,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
}
FAMILIES = {
    "llama": ("llama_gqa", PLAIN),
    "qwen2": ("qwen2", PLAIN),
    "qwen3": ("qwen3", PLAIN),
    "deepseek": ("deepseek_moe_hub", {**PLAIN, "moe_intermediate_size": 64}),
    "deepseek_v2": ("deepseek_v2_groups", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v32": ("deepseek_v32_sparse", {**LATENT, "index_head_dim": 64}),
}
"""model_type -> a variant of tests/tiny.py, and its sizes."""

SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4"},
    "nf4, double": {"quantization": "nf4", "quantization_double": True},
    "int8": {"quantization": "int8"},
}
TOKENS = 64


def errors(variant: str, sizes: dict[str, Any], seed: int) -> dict[str, float]:
    """Of one random model: scheme -> error of its logits."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.build_checkpoint(folder, variant, seed=seed, dtype="bfloat16", **sizes)
        ids = np.random.default_rng(seed).integers(3, 250, (2, TOKENS))
        exact = np.asarray(dsjax.load_pretrained(path)(ids))
        found = {}
        for name, words in SCHEMES.items():
            apart = np.asarray(dsjax.load_pretrained(path, **words)(ids)) - exact
            of_token = np.linalg.norm(apart, axis=-1) / np.linalg.norm(exact, axis=-1)
            found[name] = float(np.median(of_token))
    return found


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    table = {}
    print("| family | " + " | ".join(SCHEMES) + " |\n|---|" + "---|" * len(SCHEMES))
    for family, (variant, sizes) in FAMILIES.items():
        drawn = [errors(variant, sizes, seed) for seed in range(seeds)]
        table[family] = {name: float(np.mean([one[name] for one in drawn])) for name in SCHEMES}
        print(f"| `{family}` | " + " | ".join(f"{x:.3f}" for x in table[family].values()) + " |")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    described = {"machine": machine.describe(), "seeds": seeds, "errors": table}
    RESULT.write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
