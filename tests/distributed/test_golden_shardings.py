# SPDX-License-Identifier: Apache-2.0
"""Where every array of a recipe lies on a mesh, written down: a change shows as a difference.

`python tests/distributed/test_golden_shardings.py` writes the files anew, to be read before they
are committed.
"""

import sys
from pathlib import Path

import pytest

from dsjax.config import load_config
from dsjax.distributed.sharding import leaf_sharding, replication_report
from dsjax.plan.report import table
from dsjax.plan.topologies import open_topology
from dsjax.training.setup import assemble

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/shardings"

CASES = {
    "deepseek_r1_lora": ("deepseek_r1", "v5p:2x4x4", {"fsdp": 4, "expert": 8}),
    "deepseek_v2_lora": ("deepseek_v2", "v5e:2x4", {"fsdp": 2, "expert": 4}),
    "deepseek_v2_lite_lora": ("deepseek_v2_lite", "v5e:2x4", {"fsdp": 1, "expert": 8}),
    "deepseek_llm_7b_full": ("deepseek_llm_7b", "v5e:4x4", {"fsdp": 16}),
    "deepseek_llm_67b_lora": ("deepseek_llm_67b", "v5e:2x4", {"fsdp": 4, "tensor": 2}),
    "r1_distill_llama_8b_lora": ("r1_distill_llama_8b", "v5e:2x4", {"data": 2, "fsdp": 4}),
    "r1_distill_qwen_7b_lora": ("r1_distill_qwen_7b", "v5e:2x4", {"fsdp": 8}),
}
"""Recipe -> its model's config.json, devices, the mesh."""


def _table(recipe: str) -> str:
    model, topology, sizes = CASES[recipe]
    words = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
    words.append(f"model.path={ROOT}/tests/model_configs/{model}")
    config = load_config(ROOT / f"configs/{recipe}.yaml", words)
    setup = assemble(config, open_topology(topology).devices, weights=False)
    mesh = setup.mesh
    rows = [("array", "shape", "dtype", "divided by", "on a device")]
    for name, leaf in setup.partition.leaves.items():
        sharding = leaf_sharding(leaf, mesh)
        held = sharding.shard_shape(leaf.shape)
        spec = " ".join(str(entry).replace("'", "").replace(",)", ")") for entry in sharding.spec)
        shapes = (" x ".join(map(str, shape)) for shape in (leaf.shape, held))
        whole, part = shapes
        rows.append((name, whole, leaf.dtype.name, spec, part))
    head = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    lines = [head, "", *table(rows), "", *replication_report(setup.partition.leaves, mesh)]
    return "\n".join(lines).rstrip() + "\n"


@pytest.mark.parametrize("recipe", CASES)
def test_every_array_lies_where_it_is_written_down(recipe: str) -> None:
    assert _table(recipe) == (GOLDEN / f"{recipe}.txt").read_text()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        (GOLDEN / f"{case}.txt").write_text(_table(case))
