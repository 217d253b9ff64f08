# SPDX-License-Identifier: Apache-2.0
"""What an export holds: only what training changed is changed, and everything else is kept.

Runs of a few steps on tiny checkpoints, started in this process; `python -m dsjax.export` in this
process as well, once in its own. Whether the numbers are those of PEFT is tests/parity's question.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import small_run
import tiny
import torch
import yaml
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from dsjax import train
from dsjax.config import load_config, located
from dsjax.errors import ConfigError
from dsjax.export import command as export
from dsjax.training.orbax_store import OrbaxStore

MANIFEST = "dsjax_export.json"
Q_PROJ = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]


def raw_tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, as they stand in the files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = data[8 + length + start : 8 + length + end]
    return found


def arrays(folder: Path, like: dict[str, Any]) -> dict[str, np.ndarray]:
    """bfloat16 tensors as float32 arrays of the shapes of `like`."""
    raw = raw_tensors(folder)
    return {
        name: np.frombuffer(raw[name], ml_dtypes.bfloat16).astype(np.float32).reshape(shape)
        for name, shape in like.items()
    }


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by the headers."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        found |= {name: tuple(e["shape"]) for name, e in header.items() if name != "__metadata__"}
    return found


def add_tensors(folder: Path, name: str) -> None:
    """Add a float32 tensor per layer to the last of a checkpoint's files."""
    file = sorted(folder.glob("*.safetensors"))[-1]
    added = {name.format(layer): torch.arange(6.0) for layer in range(3)}
    save_torch(load_torch(file) | added, file, metadata={"format": "pt"})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(added, file.name)
    path.write_text(json.dumps(index, indent=2))


def train_here(config: Path, *overrides: str) -> None:
    assert train.main(["--config", str(config), *overrides]) == 0


def export_here(run: Path, out: Path, form: str) -> None:
    assert export.main(["--run", str(run), "--out", str(out), "--format", form]) == 0


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of LoRA on the q projections of a sharded bfloat16 model.

    Its checkpoint has a tensor that no model has, a tokenizer, a template and a licence.
    """
    folder = tmp_path_factory.mktemp("export")
    config = small_run.write_inputs(
        folder,
        "lora",
        adapter={"target_modules": ["q_proj"], "lora_dropout": 0.0},
        training={"max_steps": 6, "eval_steps": None},
        checkpoint={"save_steps": 4},
        data={"eval": None},
        optimizer={"warmup_ratio": 0.0, "learning_rate": 0.05},
    )
    shutil.rmtree(folder / "model")
    # Published conversions of 2023 hold rotary buffers, which are carried, not computed with.
    tiny.build_checkpoint(folder / "model", "llama_gqa", dtype="bfloat16", shards=3)
    add_tensors(folder / "model", "model.layers.{}.self_attn.rotary_emb.inv_freq")
    (folder / "model" / "chat_template.jinja").write_text("{{ bos_token }}")
    train_here(config)
    return folder


def test_merged_keeps_everything_but_what_was_trained(trained: Path):
    source, out = trained / "model", trained / "run" / "export"
    before, after = small_run.contents(source), small_run.contents(out)
    assert after.keys() - before.keys() == {"README.md", MANIFEST}
    assert before.keys() - after.keys() == set()
    changed = {name for name in before if after[name] != before[name]}
    assert all(name.endswith(".safetensors") for name in changed)
    for name in changed:  # names, order, dtypes, shapes, metadata
        length = 8 + struct.unpack("<Q", before[name][:8])[0]
        assert after[name][:length] == before[name][:length]
    old, new = raw_tensors(source), raw_tensors(out)
    assert any("inv_freq" in name for name in old)
    assert [name for name in old if new[name] != old[name]] == Q_PROJ


def test_merged_is_the_float32_sum_rounded_once(trained: Path, tmp_path: Path):
    export_here(trained / "run", tmp_path / "peft", "peft")
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    scale = np.float32(config["lora_alpha"] / config["r"])
    source = arrays(trained / "model", {name: shapes(trained / "model")[name] for name in Q_PROJ})
    merged = raw_tensors(trained / "run" / "export")
    for name in Q_PROJ:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        low, high = (adapter[f"{key}.lora_{x}.weight"] for x in "AB")
        assert np.abs(high).max() > 1e-3
        exact = source[name] + np.float64(scale) * high.astype(np.float64) @ low.astype(np.float64)
        expected = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
        written = np.frombuffer(merged[name], ml_dtypes.bfloat16).reshape(expected.shape)
        # A sum within float32's rounding of a tie may fall to either side; nothing else may.
        differs = written != expected
        assert differs.mean() < 1e-3
        np.testing.assert_allclose(
            written[differs].astype(np.float32), expected[differs].astype(np.float32), rtol=2**-7
        )


@pytest.mark.slow
def test_full_training_changes_only_what_trains(trained: Path, tmp_path: Path):
    """Layers kept by `freeze` in the middle of a stack keep their very bytes too."""
    frozen = [r"model\.layers\.1\..*", "model.embed_tokens.*", "lm_head.*"]
    config = yaml.safe_load((trained / "config.yaml").read_text())
    config["adapter"] = {"peft_type": None}
    config["training"] |= {"freeze": frozen, "max_steps": 2}
    config["output_dir"] = str(tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    train_here(file)
    old, new = raw_tensors(trained / "model"), raw_tensors(tmp_path / "run" / "export")
    assert new.keys() == old.keys()
    same = {name for name in old if new[name] == old[name]}
    kept = ("model.layers.1.", "model.embed_tokens.", "lm_head.")
    expected = {name for name in old if name.startswith(kept) or "inv_freq" in name}
    assert same == expected


def test_peft_config_states_every_field(trained: Path, tmp_path: Path):
    export_here(trained / "run", tmp_path / "out", "peft")
    out = tmp_path / "out"
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", MANIFEST}
    assert {path.name for path in out.iterdir()} == names
    config = json.loads((out / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(trained / "model"),
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "init_lora_weights": True,
    }
    assert {key: config.get(key, "absent") for key in expected} == expected


@pytest.mark.parametrize(("form", "library"), [("merged", "transformers"), ("peft", "peft")])
def test_model_card_parses(trained: Path, tmp_path: Path, form: str, library: str):
    from huggingface_hub import ModelCard

    export_here(trained / "run", tmp_path / "out", form)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == library
    assert card.data.base_model is None  # the hub takes no card that names a folder
    assert str(trained / "model") in card.text
    assert "## Loss" in card.text and "| 6 |" in card.text


def test_command_gives_the_run_s_own_export(trained: Path, tmp_path: Path, run_cli):
    out = tmp_path / "out"
    told = run_cli("export", "--run", trained / "run", "--out", out, "--format", "merged")
    assert told.returncode == 0, told.stderr
    assert small_run.contents(out) == small_run.contents(trained / "run" / "export")


def test_interrupted_run_exports_its_newest_complete_checkpoint(trained: Path, tmp_path: Path):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained / "run", run)
    checkpoints = run / "checkpoints"
    shutil.move(checkpoints / "6", checkpoints / "6.orbax-checkpoint-tmp-1")
    before = small_run.states(run)
    export_here(run, out, "merged")
    assert small_run.states(run) == before  # the run may still be alive
    assert json.loads((out / MANIFEST).read_text())["step"] == 4
    assert "4 steps" in (out / "README.md").read_text()
    finished = raw_tensors(trained / "run" / "export")
    assert [n for n, raw in raw_tensors(out).items() if raw != finished[n]] == Q_PROJ


def test_a_run_that_removes_what_is_read_is_exported_at_its_newest_step(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A run with `save_total_limit` goes on meanwhile."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    read_leaves, reads = OrbaxStore.read_leaves, []

    def removed_meanwhile(self: OrbaxStore, step: int, *wanted: Any, **options: Any) -> Any:
        reads.append(step)
        if len(reads) == 1:
            shutil.copytree(self.directory / str(step), self.directory / str(step + 1))
            for path in (self.directory / str(step) / "state" / "d").iterdir():
                path.unlink()
        return read_leaves(self, step, *wanted, **options)

    monkeypatch.setattr(OrbaxStore, "read_leaves", removed_meanwhile)
    export_here(run, tmp_path / "out", "merged")
    said = capsys.readouterr().err
    assert reads == [6, 7] and json.loads((tmp_path / "out" / MANIFEST).read_text())["step"] == 7
    assert f"{run}/checkpoints/6: got a checkpoint that was removed while it was read" in said
    assert "exported step 7 as merged" in said and "damaged" not in said


@pytest.mark.slow
def test_twice_replaces_its_own(trained: Path, tmp_path: Path):
    out = tmp_path / "out"
    export_here(trained / "run", out, "merged")
    before = small_run.states(out)
    export_here(trained / "run", out, "merged")
    assert small_run.states(out) == before
    export_here(trained / "run", out, "peft")
    assert not (out / "config.json").exists() and (out / "adapter_config.json").exists()


def test_export_needs_no_mesh_of_the_run(trained: Path, tmp_path: Path):
    """A run on a pod is exported on one machine."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["mesh"] |= {"data": 16, "fsdp": 4}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export_here(run, tmp_path / "out", "merged")
    original = raw_tensors(trained / "run" / "export")
    assert raw_tensors(tmp_path / "out") == original


def test_foreign_folders_are_refused(trained: Path, tmp_path: Path):
    def refusal(out: Path) -> str:
        before = small_run.states(out)
        with pytest.raises(ConfigError) as error:
            export_here(trained / "run", out, "merged")
        assert small_run.states(out) == before
        return str(error.value)

    (tmp_path / "notes.txt").write_text("mine")
    assert refusal(tmp_path).startswith(f"--out: got {str(tmp_path)!r}, which is not empty")
    assert refusal(trained / "run").startswith("--out: got ")
    assert refusal(trained / "model").startswith("--out: got ")


def test_the_model_that_a_run_began_with_is_not_replaced(trained: Path, tmp_path: Path):
    """A second training on an earlier export: that folder is ours, and its input."""
    first = shutil.copytree(trained / "run" / "export", tmp_path / "first")
    before = small_run.states(first)
    for place in (first, tmp_path):
        with pytest.raises(ConfigError, match="export.path: got .* model.path"):
            train_here(
                trained / "config.yaml",
                f"model.path={first}",
                f"output_dir={tmp_path}/run",
                f"export.path={place}",
            )
    assert small_run.states(first) == before
    assert not (tmp_path / "run").exists()


def test_no_run_and_no_checkpoint_are_refused(trained: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--run: got .* expected the output_dir of a run"):
        export_here(tmp_path, tmp_path / "out", "merged")
    shutil.copyfile(trained / "run" / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="got no complete checkpoint, expected one"):
        export_here(tmp_path, tmp_path / "out", "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


@pytest.mark.slow
def test_the_token_that_ends_turns_stops_generation_after_the_export(tmp_path: Path):
    """The template ends turns with another token than the one at which the checkpoint stops."""
    limits = {"max_steps": 1, "eval_steps": None}
    config = small_run.write_inputs(tmp_path, "lora", training=limits, data={"eval": None})
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("+ eos_token -", "+ '</think>' -"))
    source = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    ending = tiny.SPECIAL_TOKENS.index("</think>")
    train_here(config, "export.format=merged")
    out = tmp_path / "run" / "export"
    stops = [source["eos_token_id"], ending]
    written = json.loads((out / "generation_config.json").read_text())
    assert written == source | {"eos_token_id": stops}
    export_here(tmp_path / "run", tmp_path / "peft", "peft")
    for folder in (out, tmp_path / "peft"):
        card = (folder / "README.md").read_text()
        assert f"Turns end with `</think>` (token {ending})" in card and str(stops) in card


@pytest.mark.slow
def test_a_run_with_relative_paths_is_exported_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    brief = {"max_steps": 1, "eval_steps": None}
    file = small_run.write_inputs(tmp_path, "lora", training=brief, data={"eval": None})
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(file), "model.path=model", "output_dir=run"]
    assert train.main(words) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    again = ["--run", "../run", "--format", "merged", "--out"]
    assert export.main([*again, "../run/export"]) == 0
    assert "already there: step 1 as merged" in capsys.readouterr().err
    assert export.main([*again, "out"]) == 0
    assert raw_tensors(Path("out")) == raw_tensors(tmp_path / "run/export")

    # The run goes on from here as well, by whichever name its model is given.
    moved = ["--config", str(file), "model.path=../model", f"output_dir={tmp_path / 'run'}"]
    assert train.main(moved) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_only_what_is_here_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = small_run.write_inputs(tmp_path, "lora")
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        ("model", str(tmp_path / "model")),
        ("deepseek-ai/absent", "deepseek-ai/absent"),
        ("gs://bucket/model", "gs://bucket/model"),
    ):
        config = load_config(file, [f"model.path={given}"])
        assert located(config).model.path == expected
        assert located(config).adapter == config.adapter
