# SPDX-License-Identifier: Apache-2.0
"""Plans: what is planned is what a run then needs; what cannot run is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
import small_run

from dsjax import plan, planning
from dsjax.assembly import assemble, load_frozen, load_trainable
from dsjax.config import load_config
from dsjax.errors import ConfigError
from dsjax.program import Collective, Collectives, memory_of
from dsjax.step import init_state, lower_train_step, step_config

KEYS = {
    *("fits", "platform", "devices", "peak_bytes_per_device", "hbm_bytes_per_device"),
    *("total_params", "trainable_params", "flops_per_step", "compile_seconds"),
}


def _config(folder: Path, kind: str, variant: str, **mesh: int) -> Path:
    """A run's file, with nothing of its model left but config.json."""
    config = small_run.write_inputs(folder, kind, variant=variant, mesh=mesh)
    return config


def _bare(folder: Path) -> str:
    (folder / "bare").mkdir()
    shutil.copy(folder / "model/config.json", folder / "bare")
    return f"model.path={folder / 'bare'}"


def _plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert plan.main([*words, "--topology", "cpu:8", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _held(tree: Any, device: Any) -> int:
    """Bytes that live arrays have on a device."""
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize(
    ("kind", "variant", "mesh"),
    [
        ("lora", "llama_gqa", {"fsdp": 4, "tensor": 2}),
        ("full", "deepseek_v3_hub", {"fsdp": 2, "expert": 4}),
    ],
)
def test_a_plan_is_what_the_run_then_needs(
    kind: str,
    variant: str,
    mesh: dict[str, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = _config(tmp_path, kind, variant, **mesh)
    words = ["--config", str(file), "training.batch_size=16"]
    planned = _plan(capsys, *words, _bare(tmp_path), "data.train=absent.jsonl")

    config = load_config(file, words[2:])
    parts = assemble(config)
    step = step_config(config, parts.partition, parts.mesh, 12)
    live = memory_of(lower_train_step(step, 16, config.data.max_length).compile(), "cpu")
    frozen = load_frozen(parts, 0)
    state = init_state(load_trainable(parts, 0), step, 0)
    device, classes = jax.devices()[0], planned["classes"]

    assert planned["fits"] and set(planned) >= KEYS
    assert planned["peak_bytes_per_device"] == pytest.approx(live.peak, rel=0.05)
    assert classes["frozen weights"] == _held(frozen, device)
    assert classes["trainable weights"] == _held(state.trainable, device)
    assert classes["optimizer"] == _held(state[1:], device)
    given = sum(size for name, size in classes.items() if name != "temporaries")
    assert given == pytest.approx(live.arguments, rel=0.05)
    trained, everything = parts.partition.counts()
    assert (planned["trainable_params"], planned["total_params"]) == (trained, everything)
    assert planned["devices"] == 8 and planned["platform"] == "cpu"
    assert planned["collectives"] != [] and planned["unknown_loops"] == 0


def test_the_table_is_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Collectives([Collective("all-reduce", 3, 2**30)], unknown_loops=2)
    monkeypatch.setattr(planning, "collectives_of", lambda text: found)
    file = _config(tmp_path, "lora", "llama_gqa")
    words = ["--config", str(file), "--topology=cpu:8", _bare(tmp_path), "--verbose"]
    assert plan.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("fits on cpu:8: 8 x cpu\nmesh        fsdp 8\n")
    assert "temporaries" in out and "no figures are known of this device" in out
    assert "all-reduce                 3 times     1.00 GiB" in out
    assert "loops of unknown length, counted once: 2\n" in out
    assert "model.layers.self_attn.q_proj.weight" in out and "fsdp x expert" in out


def test_a_search_marks_the_largest_batch_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.plan_search, "MOST_ROWS", 2)
    file = _config(tmp_path, "lora", "llama_gqa")
    words = ["--config", str(file), "--topology", "cpu:8", _bare(tmp_path), "--search"]
    assert plan.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(f["batch_size"], f["gradient_checkpointing"], f["chosen"]) for f in found] == [
        (8, "full", False),
        (16, "full", False),
        (16, "none", True),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--topology: got nothing, expected one such as"),
        (["--topology=cpu:8", "mesh.fsdp=3"], r"mesh: got .*number of devices \(8\)"),
        (["--topology=cpu:8", "training.batch_size=12"], "training.batch_size: got 12, .*multiple"),
        (["--topology=cpu:8", "--topology=cpu:4"], "--topology: got cpu:8 and cpu:4, expected one"),
        (["--topology=cpu:8", "--search", "--suggest"], "--search: got it beside --suggest"),
        (["--suggest", "--topology=cpu"], "--topology: got cpu, expected with --suggest one of v4"),
        (["--topology=cpu:8", "model.path=nowhere"], "model.path: got 'nowhere'"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    file = _config(tmp_path, "lora", "llama_gqa")
    with pytest.raises(ConfigError, match=message):
        plan.main(["--config", str(file), *words])
