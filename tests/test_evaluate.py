# SPDX-License-Identifier: Apache-2.0
"""The command gives transformers' token mean, however rows are packed; runs and files; refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import yaml

from dsjax import evaluate
from dsjax.config import CheckpointSection, load_config
from dsjax.errors import ConfigError
from dsjax.training.checkpoint import Checkpointer
from dsjax.training.restore import read_meta
from dsjax.training.setup import assemble, load_trainable

Result = dict[str, object]
ROWS = 13
MAX_LENGTH = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_checkpoint(tmp_path_factory.mktemp("model"), "llama_gqa")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token rows of several lengths, part of them with a masked prompt, one over-long."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(ROWS):
        ids = rng.integers(3, 280, 40 if number == 5 else int(rng.integers(2, 30))).tolist()
        masked = len(ids) // 2 if number % 3 == 0 else 0
        lines.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(tmp_path: Path, checkpoint: Path, rows: Path) -> Path:
    tree = {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "data": {"train": str(rows), "eval": str(rows), "max_length": MAX_LENGTH},
        "training": {"batch_size": 8},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def run(capsys) -> Callable[..., Result]:
    """Run the command; stdout must be its JSON alone."""

    def call(*words: object) -> Result:
        assert evaluate.main([str(word) for word in words]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def reference(checkpoint: Path, rows: Path, max_length: int) -> tuple[float, float, int]:
    """transformers' mean loss and accuracy over all trained tokens, and how many there are."""
    model = tiny.reference_model(checkpoint)
    losses, hits = [], []
    for line in rows.read_text().splitlines():
        row = {key: torch.tensor([ids[:max_length]]) for key, ids in json.loads(line).items()}
        with torch.no_grad():
            logits = model(row["input_ids"]).logits[0, :-1]
        targets = row["labels"][0, 1:]
        trained = targets != -100
        loss = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none")
        losses += loss[trained].double().tolist()
        hits += (logits.argmax(-1) == targets)[trained].tolist()
    return float(np.mean(losses)), float(np.mean(hits)), len(losses)


@pytest.mark.parity
def test_the_loss_is_that_of_transformers_packed_or_not(run, config: Path, checkpoint, rows):
    loss, accuracy, tokens = reference(checkpoint, rows, MAX_LENGTH)

    packed = run("--config", config)
    unpacked = run("--config", config, "data.packing=false")

    assert packed["loss"] == pytest.approx(loss, rel=1e-6)
    assert unpacked["loss"] == pytest.approx(loss, rel=1e-6)
    assert packed["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert packed["accuracy"] == pytest.approx(accuracy)
    assert packed["trained_tokens"] == unpacked["trained_tokens"] == tokens
    lengths = [len(json.loads(line)["input_ids"]) for line in rows.read_text().splitlines()]
    assert packed["tokens"] == sum(min(length, MAX_LENGTH) for length in lengths)
    assert (packed["rows"], packed["truncated"], packed["dropped"]) == (ROWS, 1, 0)
    assert packed["step"] is None


def test_a_model_is_evaluated_on_files(run_cli, checkpoint: Path, rows: Path):
    words = ("--model", checkpoint, "--data", rows, "--data", rows, "--dtype", "float32")
    done = run_cli("evaluate", *words, "--max-length", MAX_LENGTH, "--batch-size", 4, devices=2)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    loss, _, tokens = reference(checkpoint, rows, MAX_LENGTH)
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert (result["trained_tokens"], result["truncated"]) == (2 * tokens, 2)
    assert (result["model"], result["data"]) == (str(checkpoint), [str(rows)] * 2)
    assert "over-long: 2 truncated" in done.stderr


def test_over_long_rows_can_be_dropped(run, config: Path):
    result = run("--config", config, "data.overlong=drop")
    assert (result["rows"], result["sequences"], result["dropped"]) == (ROWS, ROWS - 1, 1)


def test_the_newest_checkpoint_of_a_run_is_evaluated(run, config: Path, rows: Path, tmp_path: Path):
    trained = tiny.build_checkpoint(tmp_path / "trained", "llama_gqa", seed=9)
    settings = load_config(config, [f"model.path={trained}"])
    setup = assemble(settings)
    (tmp_path / "run").mkdir()
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", CheckpointSection())
    meta = {
        "started": "2026-11-26T09:30:00",
        "contents": assemble(load_config(config)).contents(),
        "frozen": {},
    }
    checkpointer.save(3, {"trainable": load_trainable(setup, {}, 0)}, meta, force=True)
    checkpointer.close()

    result = run("--config", config)

    loss, _, _ = reference(trained, rows, MAX_LENGTH)
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["step"] == 3

    (tmp_path / "run" / "config.yaml").write_text(config.read_text())
    with pytest.raises(ConfigError) as error:
        evaluate.main(["--config", str(config), "training.freeze=[embed_tokens]"])
    assert "which holds a run with other training.freeze, expected the run of" in str(error.value)
    with pytest.raises(ConfigError, match="a run with other objective.bias_update_speed, expected"):
        evaluate.newest_checkpoint(load_config(config, ["objective.bias_update_speed=0.001"]))
    other_data = ["--config", str(config), f"data.train={tmp_path / 'other.jsonl'}"]
    assert run(*other_data, "model.param_dtype=float32")["step"] == 3


def test_what_json_cannot_hold_is_null(capsys):
    evaluate.print_results({"loss": float("nan"), "perplexity": math.inf, "tokens": 5})
    said = capsys.readouterr()
    assert json.loads(said.out) == {"loss": None, "perplexity": None, "tokens": 5}
    assert "loss: got nan" in said.err and "perplexity: got inf" in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            [],
            [
                "--model: got nothing, expected a checkpoint; or FILE.yaml of a run",
                "--data: got noth",
            ],
        ),
        (["--config", "c.yaml", "--model", "m"], ["--model: got it beside c.yaml, expected one"]),
        (["--config", "c.yaml", "--batch-size", "4"], ["write training.batch_size=..."]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml: got No such file"]),
        (["nowhere.yaml", "data.eval=f"], ["nowhere.yaml: got No such file"]),
        (["a.yaml", "--config", "b"], ["--config: got b and a.yaml, expected one YAML file"]),
        (["--model", "m", "--data", "f", "--max-length", "1"], ["--max-length: got 1, expected"]),
        (["--model", "m", "--data", "f", "--batch-size", "0"], ["--batch-size: got 0, expected"]),
        (["--model", "m", "--data", "f", "a.b=1"], ["a.b=1: got an override without FILE.yaml"]),
        (["--model", "/nowhere", "--data", "f"], ["--model: got '/nowhere', expected a directory"]),
    ],
)
def test_refusals(words: list[str], says: list[str]):
    with pytest.raises(ConfigError) as error:
        evaluate.main(words)
    for part in says:
        assert part in str(error.value)


def test_refusals_of_files(checkpoint: Path, rows: Path, config: Path):
    model = ["--model", str(checkpoint)]
    with pytest.raises(ConfigError, match=r"--data\[0\]: got none.jsonl, expected a file that"):
        evaluate.main([*model, "--data", "none.jsonl"])
    with pytest.raises(ConfigError, match="--batch-size: got 3, expected a multiple of 8"):
        evaluate.main([*model, "--data", str(rows), "--batch-size", "3"])
    with pytest.raises(ConfigError, match="--adapter: got '/nowhere', expected"):
        evaluate.main([*model, "--data", str(rows), "--adapter", "/nowhere"])
    with pytest.raises(ConfigError, match="data.eval: got null, expected files or hub datasets"):
        evaluate.main(["--config", str(config), "data.eval=null"])


def test_an_unknown_option():
    with pytest.raises(ConfigError, match=r"--modell: got an option .* --model "):
        evaluate.main(["--modell", "m"])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"started": None}, "whose started is not what this version saves"),
        ({"started": "yesterday"}, "whose started is not"),
        ({"contents": []}, "whose contents is not"),
        ({"frozen": {"w": ["float32"]}}, "whose frozen.w is not"),
        ({"meter": {"run": {"loss": "x"}}}, "whose meter."),
    ],
)
def test_what_another_version_saved_beside_the_state_is_refused(tmp_path: Path, changes, part):
    whole = {"started": "2026-11-26T09:30:00", "contents": {"model.path": "a"}, "frozen": {}}
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointSection())
    checkpointer.save(3, {"w": jnp.zeros(2)}, whole, force=True)
    checkpointer.save(4, {"w": jnp.zeros(2)}, whole | changes, force=True)
    assert read_meta(checkpointer, 3) == whole
    with pytest.raises(ConfigError) as caught:
        read_meta(checkpointer, 4)
    assert f"{tmp_path}/checkpoints/4: got a checkpoint {part}" in str(caught.value)
    checkpointer.close()
