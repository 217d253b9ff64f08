# SPDX-License-Identifier: Apache-2.0
"""What is counted before a run begins is what its export takes, to the byte."""

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
import tiny

from dsjax import train
from dsjax.config import RunConfig, load_config
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.export import command as export
from dsjax.export import disk_space
from dsjax.export.disk_space import check_disk
from dsjax.export.merge import changed_tensors
from dsjax.export.run import export_bytes
from dsjax.training.setup import Assembly, assemble
from dsjax.training.state import step_config
from dsjax.weights.write import write_checkpoint

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4}
EVERYTHING = {"peft_type": None}
FP8 = "deepseek_v3_fp8_mtp_hub"

CASES: dict[str, tuple[str, dict[str, Any], list[str], str | None, dict[str, Any]]] = {
    "lora": ("llama_gqa", LORA, [], None, {"dtype": "bfloat16", "shards": 3}),
    "full": ("llama_gqa", EVERYTHING, [], None, {"dtype": "bfloat16", "shards": 3}),
    "full float32": ("llama_gqa", EVERYTHING, [], None, {}),
    "tied with a copy": ("llama_tied", EVERYTHING, [], None, {"head_copy": True}),
    "bin": ("deepseek_v3_bin", EVERYTHING, ["model.embed_tokens.*"], None, {}),
    "fp8 lora": (FP8, LORA | {"target_modules": ["o_proj", "kv_b_proj"]}, [], None, {}),
    "fp8 lora fp8": (FP8, LORA | {"target_modules": ["o_proj", "kv_b_proj"]}, [], "fp8", {}),
    "fp8 experts": (FP8, LORA | {"target_modules": ["experts.2.up_proj"]}, [], None, {}),
    "fp8 full": (FP8, EVERYTHING, [], None, {"shards": 4}),
    "fp8 full fp8": (FP8, EVERYTHING, [], "fp8", {"shards": 4}),
    "fp8 half": (FP8, EVERYTHING, ["model.layers.2.*", "lm_head.*"], None, {}),
}
"""Variant, adapter, what is frozen, `export.dtype`, and how the checkpoint is written."""


def prepared(case: str, folder: Path) -> tuple[RunConfig, Assembly]:
    variant, adapter, freeze, dtype, written = CASES[case]
    config = small_run.write_inputs(
        folder, "lora", variant=variant, training={"freeze": freeze}, export={"dtype": dtype}
    )
    shutil.rmtree(folder / "model")
    tiny.build_checkpoint(folder / "model", variant, **written)
    values = load_config(config)
    adapted = type(values.adapter).model_validate(adapter)
    values = values.model_copy(update={"adapter": adapted})
    return values, assemble(values)


def counted(config: RunConfig, setup: Assembly, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a run asks room for, for its export."""
    needs: dict[str, int] = {}
    monkeypatch.setattr(disk_space, "check_room", lambda _, wanted, *__: needs.update(wanted))
    step = step_config(config, setup.partition, setup.mesh, 2)
    check_disk(config, setup, step, "merged", False, Hosts())
    return needs["the export"]


def tensor_bytes(folder: Path) -> int:
    """What stands in the files of a folder after their headers."""
    size = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            (header,) = struct.unpack("<Q", opened.read(8))
        size += file.stat().st_size - 8 - header
    return size


@pytest.mark.parametrize("case", CASES)
def test_what_is_counted_is_what_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, setup = prepared(case, tmp_path)
    expected = counted(config, setup, monkeypatch)
    out, masks = tmp_path / "out", setup.partition.layer_masks
    out.mkdir()
    leaves = {path: setup.partition.leaves[path] for path in setup.partition.trainable}
    zeros = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    changes = changed_tensors(setup.model, setup.spec, zeros, masks)
    assert changes
    write_checkpoint(setup.source, out, changes, quantised=config.export.dtype == "fp8")
    assert tensor_bytes(out) == expected


@pytest.mark.slow
def test_the_command_asks_for_room_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run.write_inputs(
        tmp_path,
        "lora",
        training={"max_steps": 1, "eval_steps": None},
        data={"eval": None},
        export={"format": None},
    )
    assert train.main(["--config", str(config)]) == 0
    values = load_config(config)
    size = export_bytes(values, assemble(values), "merged")
    out, usage = tmp_path / "out", shutil.disk_usage(tmp_path)
    words = ["--run", str(tmp_path / "run"), "--out", str(out), "--format", "merged"]

    def with_free(free: int) -> int:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        return export.main(words)

    with pytest.raises(ConfigError, match=r"^--out: got 0\.\d MiB free at .* for the export; free"):
        with_free(size - 1)
    assert not out.exists()
    assert with_free(size) == 0 and tensor_bytes(out) == size
