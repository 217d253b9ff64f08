# SPDX-License-Identifier: Apache-2.0
"""Plans: what is planned is what a run then needs; what cannot run is refused."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import small_run
from clock_lines import without_clocks

from dsjax import train
from dsjax.config import MeshSection, RunConfig, load_config
from dsjax.distributed.compiled import Collective, Collectives, Memory, memory_of
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.plan import command as plan
from dsjax.plan import plan as planning
from dsjax.plan import search
from dsjax.plan.topologies import Topology, open_topology
from dsjax.training.announcement import announce
from dsjax.training.run import Run
from dsjax.training.run_data import read_data
from dsjax.training.setup import assemble, load_frozen, load_trainable
from dsjax.training.state import init_state, step_config
from dsjax.training.step import lower_train_step

KEYS = {
    *("fits", "platform", "devices", "peak_bytes_per_device", "hbm_bytes_per_device"),
    *("total_params", "trainable_params", "flops_per_step", "compile_seconds"),
}


@pytest.fixture(autouse=True)
def _devices() -> None:
    """Find the eight devices before a topology asks for fewer, which the process then keeps."""
    assert len(jax.devices()) == 8


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
    assert plan.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _held(tree: Any, device: Any) -> int:
    """Bytes that live arrays have on a device."""
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.slow
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
    planned = _plan(
        capsys, "--topology", "cpu:8", *words, _bare(tmp_path), "data.train=absent.jsonl"
    )

    config = load_config(file, words[2:])
    setup = assemble(config)
    step = step_config(config, setup.partition, setup.mesh, 12)
    live = memory_of(lower_train_step(step, 16, config.data.max_length).compile(), "cpu")
    frozen = load_frozen(setup, 0)
    state = init_state(load_trainable(setup, frozen, 0), step, 0)
    device, classes = jax.devices()[0], planned["classes"]

    assert planned["fits"] and set(planned) >= KEYS
    assert planned["peak_bytes_per_device"] == pytest.approx(live.peak, rel=0.05)
    assert classes["frozen weights"] == _held(frozen, device)
    assert classes["trainable weights"] == _held(state.trainable, device)
    assert classes["optimizer"] == _held(state[1:], device)
    given = sum(size for name, size in classes.items() if name != "temporaries")
    assert given == pytest.approx(live.arguments, rel=0.05)
    trained, everything = setup.partition.counts()
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
    assert "temporaries" in out and "no peak is known for this device in this dtype" in out
    assert "all-reduce                 3 times     1.00 GiB" in out
    assert "loops of unknown length, counted once: 2\n" in out
    assert "model.layers.self_attn.q_proj.weight" in out and "tensor x fsdp" in out


@pytest.mark.slow
def test_an_evaluation_is_planned_in_the_portions_of_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, bare = _config(tmp_path, "full", "llama_gqa"), _bare(tmp_path)
    words = ["--topology", "cpu:8", "--config", str(file), bare, "data.eval=absent.jsonl"]
    words += ["training.batch_size=64", "data.max_length=128"]
    whole = _plan(capsys, *words, "training.gradient_accumulation_steps=1")
    planned = _plan(capsys, *words, "training.gradient_accumulation_steps=8")
    needed = planned["evaluation_bytes_per_device"]
    assert needed < planned["peak_bytes_per_device"]
    assert needed < whole["evaluation_bytes_per_device"]
    assert needed > sum(planned["classes"].values()) - planned["classes"]["temporaries"]
    without = _plan(capsys, *words, "data.eval=null", "training.eval_steps=null")
    assert without["evaluation_bytes_per_device"] is None

    # What holds the step and not the evaluation does not fit.
    monkeypatch.setattr(planning, "memory_of", lambda *_: Memory(0, 0, 0, 0, 0, next(peaks)))
    peaks = iter([1, 2**60])
    assert plan.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("does not fit") and re.search(r"evaluation's peak .* too much", out)


@pytest.mark.slow
def test_a_search_marks_the_largest_batch_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_ROWS", 1)
    file = _config(tmp_path, "lora", "llama_gqa")
    words = ["--config", str(file), "--topology", "cpu:8", _bare(tmp_path), "--search"]
    assert plan.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(f["batch_size"], f["gradient_checkpointing"], f["chosen"]) for f in found] == [
        (8, "full", False),
        (8, "none", True),
    ]


def test_a_search_ends_where_a_batch_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeps = {"none": 8, "dots": 6, "names": 3, "full": 1}

    def planned(config: RunConfig, topology: Topology) -> SimpleNamespace:
        training = config.training
        peak = training.batch_size * keeps[training.gradient_checkpointing]
        return SimpleNamespace(fits=peak <= 48, peak_bytes_per_device=peak, time=None)

    monkeypatch.setattr(search, "make_plan", planned)
    file = _config(tmp_path, "lora", "llama_gqa", fsdp=4)
    words = ["--config", str(file), "--topology", "cpu:4", "--search"]
    assert plan.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:-2]] == [
        *([str(rows), "full", "fits"] for rows in (4, 8, 16, 32)),
        ["64", "full", "does"],
        ["32", "none", "does"],
        ["32", "dots", "does"],
        ["32", "names", "does"],
    ]
    assert lines[-1] == (
        "training.batch_size=32 training.gradient_accumulation_steps=1 "
        "training.gradient_checkpointing=full"
    )


def test_a_compiler_that_runs_out_of_memory_says_that_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError(messages[0])

    messages = ["RESOURCE_EXHAUSTED: Ran out of memory in\n memory space hbm. Largest program ..."]
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    config = load_config(_config(tmp_path, "lora", "llama_gqa"), [])
    refused = planning.make_plan(config, open_topology("cpu:8"))
    assert not refused.fits and refused.peak_bytes_per_device is None
    assert refused.compiler_says == "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."
    messages[0] = "INTERNAL: a defect"
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        planning.make_plan(config, open_topology("cpu:8"))


def test_the_banner_of_a_run_agrees_with_its_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _config(tmp_path, "full", "deepseek_v3_hub", data=8, fsdp=1)
    words = ["training.batch_size=16"]
    config = load_config(file, words)
    setup = assemble(config)
    data = read_data(config, setup, datetime.now(UTC))
    announce(Run(config, setup, data, 12, "", {}, Hosts()))
    told = re.search(r"memory +([\d.]+) MiB per device", capsys.readouterr().err)
    classes = planning.state_bytes(
        planning.prepare(config, open_topology("cpu:8"))[1], 16, config.data.max_length
    )
    assert told and classes["optimizer"] > 2**20
    assert float(told[1]) == pytest.approx(sum(classes.values()) / 2**20, abs=0.06)


@pytest.mark.parametrize(
    ("asked", "devices", "limits", "expected"),
    [
        ({}, 8, (1, 0), [(8, 1, 1)]),
        ({"data": 4, "fsdp": 1}, 8, (1, 0), [(8, 1, 1)]),
        ({"tensor": 2}, 8, (1, 0), [(4, 1, 2)]),
        ({"tensor": 8}, 4, (1, 0), [(1, 1, 4)]),
        ({"tensor": 3}, 8, (1, 0), [(8, 1, 1)]),
        ({"tensor": -1, "fsdp": 1}, 32, (64, 24), [(4, 1, 8), (1, 4, 8)]),
        ({}, 8, (64, 1408), [(8, 1, 1), (1, 8, 1), (4, 2, 1)]),
        ({"expert": 8}, 32, (256, 2048), [(4, 8, 1), (1, 32, 1), (32, 1, 1)]),
        ({"expert": 8}, 8, (6, 0), [(4, 2, 1), (8, 1, 1)]),
    ],
)
def test_suggested_meshes(
    asked: dict[str, int],
    devices: int,
    limits: tuple[int, int],
    expected: list[tuple[int, int, int]],
) -> None:
    bounds = dict(zip(("expert", "tensor"), limits, strict=True))
    found = search.meshes(MeshSection(**asked), devices, bounds)
    assert [(m.fsdp, m.expert, m.tensor) for m in found] == expected
    assert {m.data * m.fsdp * m.expert * m.tensor for m in found} == {devices}


def _small_slices(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """Slices of simulated devices that have so many bytes each."""
    monkeypatch.setattr(search, "SLICES", {"cpu": ("1", "2", "4")})
    monkeypatch.setattr(
        search, "open_topology", lambda name: replace(open_topology(name), memory_bytes=memory)
    )


@pytest.mark.slow
def test_a_suggestion_is_the_smallest_slice_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _config(tmp_path, "full", "deepseek_v3_hub", data=2, expert=4)
    words = ["--config", str(file), _bare(tmp_path), "training.batch_size=7"]
    words.append("training.gradient_accumulation_steps=1")
    config = load_config(file, [*words[2:], "mesh.data=1", "mesh.expert=1", "mesh.fsdp=1"])
    step = planning.prepare(config, open_topology("cpu:1"))[1]
    whole = sum(planning.state_bytes(step, 7, config.data.max_length).values())

    _small_slices(monkeypatch, whole - 1)
    fit = planning.make_plan
    monkeypatch.setattr(search, "make_plan", lambda c, t: replace(fit(c, t), fits=True))
    capsys.readouterr()
    assert plan.main([*words, "--suggest", "--topology", "cpu", "--json"]) == 0
    output = capsys.readouterr()
    alone, two = json.loads(output.out)
    lines = [line for line in output.err.splitlines() if "(0:" not in line]  # without the clock's
    assert lines[0].startswith("skipping cpu:1 mesh.data=1 mesh.fsdp=1 ")
    assert lines[1].startswith("compiling cpu:2 mesh.data=1 ")
    assert (alone["fits"], alone["compiled"], alone["devices"]) == (False, False, 1)
    assert alone["given_bytes_per_device"] == whole and alone["peak_bytes_per_device"] is None
    assert "weights, optimizer and batch take 0.0" in alone["notes"][0]
    assert (two["fits"], two["compiled"], two["topology"]) == (True, True, "cpu:2")
    assert two["notes"] == ["batch_size was 7: the mesh has to divide it", "under remat full"]
    full = "training.gradient_checkpointing=full"
    again = _plan(capsys, *words, *two["overrides"], full, "--topology", two["topology"])
    assert again["peak_bytes_per_device"] == two["peak_bytes_per_device"]
    assert again["mesh"]["expert"] == 2 and again["batch_size"] == 6


def test_where_nothing_fits_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_slices(monkeypatch, 1000)
    file = _config(tmp_path, "lora", "llama_gqa")
    words = ["--config", str(file), _bare(tmp_path), "--suggest", "--topology", "cpu"]
    assert plan.main(words) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["topology", "cpu:1", "cpu:2", "cpu:4"]
    assert lines[-1] == "nothing fits up to cpu:4; a shorter data.max_length might"
    assert "compiling" not in output.err


@pytest.mark.slow
def test_a_suggestion_by_the_compiler_of_tpus(
    tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    file = _config(tmp_path, "lora", "llama_gqa")
    words = ["--config", str(file), _bare(tmp_path), "--suggest", "--topology=v5e", "--json"]
    done = run_cli("plan", *words)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["topology"], found["fits"], found["devices"]) == ("v5e:1x1", True, 1)
    assert 0 < found["peak_bytes_per_device"] < found["hbm_bytes_per_device"]
    lines = without_clocks(done.stderr).splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].endswith(f": plan {file}")
    assert lines[1].startswith("compiling v5e:1x1 mesh.fsdp=1 ")


@pytest.mark.slow
def test_the_compiler_of_tpus_refuses_what_is_too_large(
    tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    file = _config(tmp_path, "lora", "llama_gqa")
    many = (
        "training.batch_size=262144 training.gradient_checkpointing=full "
        "training.gradient_accumulation_steps=1"
    ).split()
    words = ["--config", str(file), _bare(tmp_path), "--topology=v5e:1x1", "--json", *many]
    done = run_cli("plan", *words)
    assert done.returncode == 0
    said = without_clocks(done.stderr)
    assert re.fullmatch(rf"dsjax \S+: plan {re.escape(str(file))}\n", said), done.stderr
    found = json.loads(done.stdout)
    assert not found["fits"] and found["peak_bytes_per_device"] is None
    assert found["compiler_says"].startswith("RESOURCE_EXHAUSTED: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--topology: got nothing, expected one such as"),
        (["--topology=cpu:8", "mesh.fsdp=3"], r"mesh: got .*number of devices \(8\)"),
        (["--topology=cpu:8", "training.batch_size=12"], "training.batch_size: got 12, .*multiple"),
        (["--topology=cpu:8", "--topology=cpu:4"], "--topology: got cpu:8 and cpu:4, expected one"),
        (["--topology=cpu:8", "--search", "--suggest"], "--search: got it beside --suggest"),
        (["--suggest", "--topology=cpu"], "--topology: got cpu, expected with --suggest, .*of v4"),
        (["--suggest", "--topology=v5p:2x2x1"], "got v5p:2x2x1, .*; did you mean v5p[?]"),
        (["--suggest", "--topology="], "--topology: got nothing, expected with --suggest, .*of v4"),
        (["--search", "--verbose"], "--verbose: got it beside a search, expected it of one plan"),
        (["--topology"], "--topology: got nothing, expected ACCELERATOR:SHAPE"),
        (
            ["--topologie=cpu:8"],
            r"--topologie: got an unknown option, expected .*; did you mean --topology\?",
        ),
        (["--schema"], "--schema: got an unknown option"),
        (["--topology=cpu:8", "model.path=nowhere"], "model.path: got 'nowhere'"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    file = _config(tmp_path, "lora", "llama_gqa")
    with pytest.raises(ConfigError, match=message):
        plan.main(["--config", str(file), *words])


QUANTISED = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
    "mlx": {"quantization": {"group_size": 64, "bits": 4}},
    "no method": {"quantization_config": {"bits": 4, "group_size": 64}},
    "index": {},
}


@pytest.mark.parametrize("upload", QUANTISED)
def test_a_quantised_upload_is_refused_as_training_refuses_it(upload: str, tmp_path: Path) -> None:
    """In the same words; a plan without weights has the config, and the index if there is one."""
    file = _config(tmp_path, "lora", "llama_gqa")
    model = tmp_path / "model"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | QUANTISED[upload]))
    bare = _bare(tmp_path)
    if upload == "index":
        index = model / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("q_proj.weight", "q_proj.qweight"))
        shutil.copy(index, tmp_path / "bare")
    for main, words in ((train.main, []), (plan.main, ["--topology=cpu:8", bare])):
        with pytest.raises(ConfigError) as caught:
            main(["--config", str(file), *words])
        said = str(caught.value)
        assert any(key in said for key in QUANTISED[upload] or ["q_proj.qweight"])
        assert not (tmp_path / "run").exists()
