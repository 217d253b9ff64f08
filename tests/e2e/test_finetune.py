# SPDX-License-Identifier: Apache-2.0
"""`dsjax.finetune`: the command's run, its refusals and its signals, from Python."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
import small_run
import yaml

import dsjax
from dsjax.config import load_config
from dsjax.errors import ConfigError
from dsjax.training import loop
from dsjax.training.loop import Loop

BRIEF = {"max_steps": 2, "eval_steps": None, "batch_size": 8}


def test_a_dict_a_file_and_a_configuration_are_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # As accelerators would say; of 8 CPUs none counts its memory.
    monkeypatch.setattr(loop, "peak_memory_gib", lambda devices: len(list(devices)) / 4)
    file = small_run.write_inputs(tmp_path, "lora", export={"format": "peft"})
    tree = yaml.safe_load(file.read_text()) | {"training": BRIEF, "output_dir": tmp_path / "run"}
    result = dsjax.finetune(tree)
    assert result.output_dir == tmp_path / "run"
    assert result.export == tmp_path / "run/export"
    assert (result.export / "adapter_model.safetensors").is_file()
    assert result.history == [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    (line,) = (row for row in result.history if "loss" in row)
    assert line["step"] == 2 and line["step_time"] > 0 and line["device_memory_gib"] == 2.0
    assert {"train_loss", "train_runtime", "eval_loss"} <= result.metrics.keys()
    assert {type(value) for value in result.metrics.values()} == {int, float}

    before = small_run.states(tmp_path / "run")
    words = ["training.max_steps=2", "training.eval_steps=null"]
    assert dsjax.finetune(load_config(file, words)) == result
    file.write_text(yaml.safe_dump(tree | {"output_dir": str(tmp_path / "run")}))
    assert dsjax.finetune(file) == result
    assert small_run.states(tmp_path / "run") == before  # nothing was left to do


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"path": "x"}}, r"^data.train: got nothing(?s:.*)output_dir: got nothing"),
        ({"model": {"pth": "x"}}, "model.pth: got an unknown key, .*did you mean path"),
        ({"model": "x"}, "model: got"),
        ("nowhere.yaml", r"nowhere.yaml: got No such file or directory"),
    ],
)
def test_mistakes_are_the_commands(config, message: str):
    with pytest.raises(ConfigError, match=message):
        dsjax.finetune(config)


def test_another_thread_hears_no_signals():
    said: list[BaseException] = []

    def call() -> None:
        try:
            dsjax.finetune({})
        except ConfigError as error:
            said.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert str(said[0]).startswith("finetune: got another thread, expected the main one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_saves_and_the_same_call_resumes(
    number: signal.Signals, raised: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = small_run.write_inputs(tmp_path, "lora", export={"format": None})
    tree = yaml.safe_load(file.read_text()) | {"training": BRIEF | {"max_steps": 4}}
    report = Loop._log

    def log_and_send(self, *arguments):
        signal.raise_signal(number)
        while self.run.hosts.any_preemption() is None:
            time.sleep(0.01)
        return report(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", log_and_send)
        with pytest.raises(raised):
            dsjax.finetune(tree)
    result = dsjax.finetune(tree)
    assert result.export is None
    assert [row["step"] for row in result.history if "loss" in row] == [2, 4]
