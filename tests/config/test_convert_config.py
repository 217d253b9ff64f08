# SPDX-License-Identifier: Apache-2.0
"""Files of LLaMA-Factory and TRL: what is told, what is refused, how they are recognised."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from other_trainers_files import (
    LLAMA_FACTORY,
    TRL,
    converted,
    in_a_folder,
    refusal,
    run,
    write,
)

from dsjax.config import load_config
from dsjax.config.other_trainers import counterpart, trainer_of
from dsjax.config.other_trainers.conversion import convert_file
from dsjax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures(in_a_folder.__name__)


FACTORY_REFUSED = [
    ({"stage": "dpo"}, 'stage: got "dpo", expected sft or pt; other objectives are not here'),
    ({"stage": "pt"}, 'stage: got "pt", expected packing: false beside pt; documents that are cut'),
    ({"finetuning_type": "freeze"}, 'finetuning_type: got "freeze", expected lora or full; tr'),
    (
        {"quantization_bit": 3},
        "quantization_bit: got 3, expected 4 (of quantization_type nf4) or 8",
    ),
    ({"lora_rank": 0}, "lora_rank: here adapter.r: got 0, expected an integer >= 1 and <= 65536"),
    (
        {"lora_rnk": 8},
        "lora_rnk: got an unknown key, expected one of LLaMA-Factory's; did you mean",
    ),
    ({"use_galore": True}, "use_galore: got true, expected a file without it; see optimizer.optim"),
    ({"neftune_noise_alpha": 5}, "neftune_noise_alpha: got 5, expected a file without it; no noi"),
    ({"do_train": False}, "do_train: got false, expected a file without it; a file that does not"),
    ({"adapter_name_or_path": "a,b"}, 'adapter_name_or_path: got "a,b", expected one adapter'),
    ({"dataset": None}, "dataset: got nothing, expected names of data sets in data/dataset_info"),
    ({"dataset": "our"}, "dataset: got 'our', expected a data set that data/dataset_info.json de"),
    ({"dataset": "pairs"}, "dataset: got 'pairs', whose rows are preferences, expected answers"),
    ({"dataset": "pictures"}, "dataset: got 'pictures' with the column images, expected text"),
    ({"dataset": "elsewhere"}, "dataset: got 'elsewhere' with ms_hub_url, expected hf_hub_url or"),
    ({"dataset": "tagged"}, "dataset: got 'tagged' with user_tag 'U', expected human or user; re"),
    ({"dataset": "odd"}, "dataset: got 'odd' with formatting \"columns of my own\", expected alp"),
    ({"dataset": "broken"}, "dataset: got 'broken' with columns [\"a\"], expected names in it"),
    ({"dataset": "questions,others"}, "dataset: got 'others', whose instruction is the column ask"),
    ({"dataset_dir": "nowhere"}, 'dataset_dir: got "nowhere", expected a folder with dataset_info'),
    ({"val_size": 1}, "val_size: got 1, expected a share below 1, or a number of rows above 1"),
    ({"packing": "yes"}, 'packing: got "yes", expected true or false; write it without quotes'),
    ({"lr_scheduler_type": "polynomial"}, 'lr_scheduler_type: got "polynomial", expected one of'),
    (
        {"lr_scheduler_kwargs": {"power": 2}},
        'lr_scheduler_kwargs: got {"power": 2}, expected none with cosine; others are not here',
    ),
    ({"optim": "adamw_8bit"}, 'optim: got "adamw_8bit", expected one of adamw_torch, '),
    ({"save_steps": 0.1}, "save_steps: got 0.1, expected an integer >= 1; write the number"),
    ({"fp16": True}, "fp16: got true, expected one of bf16 and fp16; take one out"),
    ({"eval_strategy": "never"}, 'eval_strategy: got "never", expected no, steps or epoch'),
    ({"val_size": 0}, 'eval_strategy: got "steps", expected rows to evaluate on beside it'),
    ({"output_dir": None}, "output_dir: got nothing, expected text"),
]
TRL_REFUSED = [
    ({"dataset_name": None, "use_peft": False}, "dataset_name: got nothing, expected a data set"),
    ({"max_length": None}, "max_length: got null, expected an integer; write the length of the lo"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, 'bnb_4bit_quant_type: got "fp4", expec'),
    ({"dtype": "float16"}, 'dtype: got "float16", expected float32 or bfloat16 in full training'),
    ({"completion_only_loss": False}, "completion_only_loss: got false, expected a file without"),
    ({"packing_strategy": "wrapped"}, 'packing_strategy: got "wrapped", expected a file without'),
    (
        {"eval_strategy": "steps", "dataset_train_split": "half"},
        'dataset_train_split: got "half", expected the default beside an evaluation',
    ),
    ({"datasets": "a/b"}, 'datasets: got "a/b", expected a list of mappings with `path`'),
    ({"datasets": [{"path": "json"}]}, 'datasets: got [{"path": "json"}], expected a hub id in'),
    ({"datasets": [{"path": "a"}, {"path": "b", "split": "x"}]}, "datasets: got [{"),
]


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [(LLAMA_FACTORY, *case) for case in FACTORY_REFUSED] + [(TRL, *case) for case in TRL_REFUSED],
)
def test_what_cannot_be_had_is_refused_by_its_name(
    base: dict[str, Any], change: dict[str, Any], message: str
):
    lines = refusal(base | change).splitlines()
    assert [line for line in lines if line.startswith(message)], lines


@pytest.mark.parametrize("base", [LLAMA_FACTORY, TRL], ids=["LLaMA-Factory", "TRL"])
def test_no_value_ends_in_a_traceback(base: dict[str, Any]):
    trainer = trainer_of(base)
    assert trainer is not None
    for name, key in trainer.keys.items():
        for odd in ({"a": {}}, [{"path": [1], "split": []}]) if key.fate == "read" else ():
            write(base | {name: odd})
            with suppress(ConfigError):
                convert_file("theirs.yaml", 4, None)


@pytest.mark.parametrize("key", ["file_name", "hf_hub_url", "subset", "split", "columns", "tags"])
def test_no_description_of_data_ends_in_a_traceback(key: str):
    write(LLAMA_FACTORY | {"dataset": "odd"})
    for odd in ([], {"prompt": [1], "role_tag": {}, "messages": 3}, "x", 7, None):
        entry = {"hf_hub_url": "a/b", "formatting": "sharegpt"} | {key: odd}
        Path("data/dataset_info.json").write_text(json.dumps({"odd": entry}))
        with suppress(ConfigError):
            convert_file("theirs.yaml", 4, None)


def test_the_batch_needs_the_number_of_devices():
    assert refusal(LLAMA_FACTORY, "--dataset-info", "data/dataset_info.json") == (
        "--devices: got nothing, expected the number of devices that the file was for; "
        "training.batch_size is the rows of a step over all of them: 2 "
        "(per_device_train_batch_size) x 8 (gradient_accumulation_steps) x devices"
    )
    assert refusal(TRL, "--devices", "0").startswith("--devices: got 0, expected an integer >= 1")


def test_data_sets_are_described_in_a_file_of_their_own(capsys: pytest.CaptureFixture[str]):
    Path("other").mkdir()
    Path("other/info.json").write_text(json.dumps({"ours": {"file_name": "rows.json"}}))
    tree = LLAMA_FACTORY | {"dataset": "ours"}
    config, _ = converted(tree, capsys, "--dataset-info", "other/info.json")
    assert config.data.train == ["other/rows.json"]
    message = refusal(tree, "--devices", "4", "--dataset-info", "none.json")
    assert message.startswith("--dataset-info: got none.json, which is no file, expected")


def test_splits_of_the_hub_have_to_be_one(capsys: pytest.CaptureFixture[str]):
    tree = LLAMA_FACTORY | {"dataset_dir": "ONLINE", "dataset": "a/b", "eval_dataset": "c/d"}
    config, _ = converted(tree | {"val_size": None}, capsys)
    assert config.data.split == "train"  # without it, c/d's validation would be taken
    Path("data/dataset_info.json").write_text(
        json.dumps({name: {"hf_hub_url": name, "split": name} for name in ("one", "two")})
    )
    message = refusal(LLAMA_FACTORY | {"dataset": "one,two"})
    assert "dataset: got one, two for data.split of its data sets on the hub" in message


def test_what_is_not_the_same_is_told(capsys: pytest.CaptureFixture[str]):
    text, report = run(LLAMA_FACTORY | {"packing": True, "dataset": "turns"}, capsys)
    assert text.startswith("# Converted from theirs.yaml (LLaMA-Factory), devices: 4.\n# Not the ")
    assert "#   max_samples: 50: all rows are read" in text
    assert "not the same: max_samples: 50: all rows are read" in report
    assert "not the same: packing: true: attention never crosses packed examples" in report
    assert 'not the same: dataset: "turns": num_samples of turns: all rows are read' in report
    counts = re.match(
        r"theirs.yaml: a file of LLaMA-Factory; keys: (\d+) not .* (\d+) with", report
    )
    assert counts and int(counts[1]) == report.count("\nnot the same: ")
    assert int(counts[1]) + int(counts[2]) == len(re.findall(r"^# {3}", text, re.M))


def test_a_line_break_in_a_value_does_not_end_the_comment(capsys: pytest.CaptureFixture[str]):
    config, text = converted(LLAMA_FACTORY | {"template": "a\nb\u2028model: c\x85d"}, capsys)
    assert config.model.path == LLAMA_FACTORY["model_name_or_path"]
    assert all(line.startswith("#") for line in text.splitlines()[:12])


def test_a_file_of_neither_is_refused():
    assert refusal({"model_name_or_path": "m"}).startswith(
        "theirs.yaml: got the keys model_name_or_path, expected those of LLaMA-Factory or TRL"
    )
    trainer = trainer_of(TRL)
    assert trainer is not None and trainer.name == "TRL"


def test_a_key_of_theirs_in_our_file_is_answered_with_ours():
    Path("ours.yaml").write_text(
        "model: {path: m, torch_dtype: x}\ndata: {train: r.jsonl}\noutput_dir: o\n"
        "adapter: {lora_rank: 8}\nper_device_train_batch_size: 4\nbf16: true\nuse_galore: true\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config("ours.yaml")
    lines = str(caught.value).splitlines()
    assert (
        "per_device_train_batch_size: got an unknown key, expected a section; here "
        "training.batch_size (rows over all devices: per_device_train_batch_size x "
        "gradient_accumulation_steps x devices)"
    ) in lines
    assert (
        "bf16: got an unknown key, expected a section; here model.dtype (true: bfloat16)" in lines
    )
    assert (
        "use_galore: got an unknown key, expected a section; no key here: see optimizer.optim"
    ) in lines
    assert any(
        line.startswith("adapter.lora_rank: ") and "here adapter.r (of LoRA)" in line
        for line in lines
    )
    with pytest.raises(
        ConfigError, match=r"expected section.key=value; here data.max_length \(2048"
    ):
        load_config("ours.yaml", ["cutoff_len=512"])
    assert counterpart("learning_rat") is None


@pytest.mark.parametrize(("tree", "name"), [(LLAMA_FACTORY, "LLaMA-Factory"), (TRL, "TRL")])
def test_a_file_of_theirs_is_recognised_as_a_whole(tree: dict[str, Any], name: str):
    write(tree)
    with pytest.raises(ConfigError) as caught:
        load_config("theirs.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"theirs.yaml: got a file of {name}, expected sections such as `model:`; convert it: "
        "dsjax convert-config theirs.yaml --devices N > ours.yaml"
    )
    assert lines[1:]


def test_the_tool_is_the_command():
    write(TRL)
    tool = ROOT / "tools" / "convert_config.py"
    done = subprocess.run(
        [sys.executable, str(tool), "theirs.yaml", "--devices", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    Path("ours.yaml").write_text(done.stdout)
    assert load_config("ours.yaml").training.batch_size == 8
    assert done.stderr.startswith("theirs.yaml: a file of TRL; keys: ")
