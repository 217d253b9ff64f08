# SPDX-License-Identifier: Apache-2.0
"""A run on an FP8 checkpoint with experts: its export changes what was trained, nothing else."""

import json
import re
from pathlib import Path

import pytest
import small_run
import tiny
import torch
from safetensors.torch import load_file

from dsjax import train
from dsjax.errors import ConfigError

pytestmark = pytest.mark.slow

VARIANT = "deepseek_v3_fp8_mtp_hub"
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
TOUCHED = re.compile(
    r"model\.layers\.([012])\.self_attn\.(\w+_proj|kv_a_proj_with_mqa)\.weight(_scale_inv)?"
)
FP8 = torch.float8_e4m3fn


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have one dtype and the same bytes."""
    return left.dtype == right.dtype and torch.equal(
        left.view(torch.uint8), right.view(torch.uint8)
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps of LoRA on the attention."""
    return small_run.write_inputs(
        tmp_path_factory.mktemp("fp8"),
        "lora",
        variant=VARIANT,
        adapter={"target_modules": ATTENTION},
        training={"max_steps": 3, "eval_steps": None},
        data={"eval": None},
        logging={"logging_steps": 1},
    )


def test_only_the_attention_changes_and_becomes_bfloat16(config: Path) -> None:
    assert train.main(["--config", str(config)]) == 0
    source, out = (tensors(config.parent / name) for name in ("model", "run/export"))

    weights = {name for name in source if TOUCHED.fullmatch(name) and not name.endswith("_inv")}
    assert len(weights) == 15
    assert {name for name in source if name not in out} == {f"{n}_scale_inv" for n in weights}
    assert {name for name in out if not same(out[name], source[name])} == weights
    assert {out[name].dtype for name in weights} == {torch.bfloat16}
    assert any(name.startswith("model.layers.3.") for name in out)  # multi-token prediction

    before, after = (
        json.loads((config.parent / name / "config.json").read_text())
        for name in ("model", "run/export")
    )
    plain = after["quantization_config"].pop("modules_to_not_convert")
    assert {f"{module}.weight" for module in plain} == weights
    assert after == before


def test_the_run_tells_how_even_the_experts_work_was(config: Path) -> None:
    train.main(["--config", str(config)])
    rows = [row for row in small_run.metrics(config.parent / "run") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert 1 <= row["expert_imbalance"] < 16
        assert row["dropped_tokens"] == 0


def test_changed_tensors_may_become_fp8_again(config: Path, tmp_path: Path) -> None:
    words = ["export.dtype=fp8", "export.min_kept=null", f"output_dir={tmp_path / 'run'}"]
    assert train.main(["--config", str(config), *words]) == 0
    source, out = (tensors(f) for f in (config.parent / "model", tmp_path / "run/export"))
    assert set(out) == set(source)
    changed = {name for name in out if not same(out[name], source[name])}
    assert changed and all(TOUCHED.fullmatch(name) for name in changed)
    assert {out[name].dtype for name in changed} == {FP8, torch.float32}
    configs = [f / "config.json" for f in (config.parent / "model", tmp_path / "run/export")]
    assert configs[0].read_bytes() == configs[1].read_bytes()


def test_fp8_is_not_made_of_what_was_none(config: Path, tmp_path: Path) -> None:
    model = tiny.build_checkpoint(tmp_path / "model", "llama_mqa")
    words = ["export.dtype=fp8", f"model.path={model}", "adapter.target_modules=[q_proj]"]
    with pytest.raises(ConfigError, match="export.dtype: got fp8, expected null; the checkpoint"):
        train.main(["--config", str(config), *words, f"output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_fp8_that_loses_most_of_a_small_update_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["export.dtype=fp8", "optimizer.learning_rate=1e-4", f"output_dir={run}"]
    with pytest.raises(ConfigError, match=r"export\.min_kept: got .*, expected at least 0\.9"):
        train.main(["--config", str(config), *words])
    assert [path.name for path in run.iterdir() if "export" in path.name] == []
    capsys.readouterr()

    # What was trained is still there, and is written when told so, with what it keeps.
    assert train.main(["--config", str(config), *words, "export.min_kept=null"]) == 0
    told = re.search(r"keep (-?[\d.]+)% of what training changed", capsys.readouterr().err)
    assert told and float(told[1]) < 90
    assert told[0] in (run / "export/README.md").read_text("utf-8")

    # That is no export as it is asked for now, and stays where it is.
    written = small_run.contents(run / "export")
    with pytest.raises(ConfigError, match=r"export\.min_kept: got .*, expected at least 0\.9"):
        train.main(["--config", str(config), *words])
    assert small_run.contents(run / "export") == written
