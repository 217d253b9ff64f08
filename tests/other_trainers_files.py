# SPDX-License-Identifier: Apache-2.0
"""Files of LLaMA-Factory and TRL, small ones of our own, and what the command makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsjax.config import RunConfig, load_config
from dsjax.config.convert_config import main
from dsjax.errors import ConfigError

INFO = {
    "ours": {"file_name": "ours.json"},
    "questions": {
        "file_name": "questions.jsonl",
        "columns": {"prompt": "question", "query": "context", "response": "answer"},
    },
    "others": {"file_name": "others.json", "columns": {"prompt": "ask", "response": "answer"}},
    "chats": {
        "hf_hub_url": "someone/chats",
        "subset": "en",
        "split": "train_sft",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user"},
    },
    "turns": {
        "file_name": "turns",
        "formatting": "sharegpt",
        "columns": {"messages": "dialogue", "system": "rules", "tools": "tools"},
        "num_samples": 10,
    },
    "papers": {"file_name": "papers.txt", "columns": {"prompt": "text"}},
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "pictures": {"file_name": "p.json", "columns": {"images": "images"}},
    "elsewhere": {"ms_hub_url": "someone/else"},
    "tagged": {"file_name": "t.json", "formatting": "sharegpt", "tags": {"user_tag": "U"}},
    "odd": {"file_name": "o.json", "formatting": "columns of my own"},
    "broken": {"file_name": "b.json", "columns": ["a"]},
}
LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "deepseek-ai/deepseek-llm-7b-chat",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "all",
    "dataset": "ours, questions",
    "template": "deepseek",
    "cutoff_len": 1000,
    "max_samples": 50,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "output_dir": "saves/lora",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "report_to": "none",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
    "val_size": 0.1,
    "per_device_eval_batch_size": 1,
    "eval_strategy": "steps",
    "eval_steps": 200,
}
TRL: dict[str, Any] = {
    "model_name_or_path": "deepseek-ai/deepseek-llm-7b-base",
    "dataset_name": "someone/rows",
    "output_dir": "saves/trl",
}


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with LLaMA-Factory's description of data sets."""
    (tmp_path / "data" / "turns").mkdir(parents=True)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    monkeypatch.chdir(tmp_path)


def write(tree: dict[str, Any]) -> None:
    Path("theirs.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def run(tree: dict[str, Any], capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Both outputs of the command."""
    write(tree)
    assert main(["theirs.yaml", "--devices", "4", *words]) == 0
    return capsys.readouterr()


def converted(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[RunConfig, str]:
    text, _ = run(tree, capsys, *words)
    Path("ours.yaml").write_text(text)
    return load_config("ours.yaml"), text


def refusal(tree: dict[str, Any], *words: str) -> str:
    write(tree)
    with pytest.raises(ConfigError) as caught:
        main(["theirs.yaml", *(words or ("--devices", "4"))])
    return str(caught.value)


def value(config: RunConfig, path: str) -> Any:
    section, dot, key = path.partition(".")
    return getattr(getattr(config, section), key) if dot else getattr(config, section)
