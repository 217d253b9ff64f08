# SPDX-License-Identifier: Apache-2.0
"""Files of LLaMA-Factory and TRL: which of our keys and values theirs become."""

import re
from pathlib import Path
from typing import Any

import pytest
from other_trainers_files import LLAMA_FACTORY, TRL, converted, in_a_folder, value

from dsjax.config import RunConfig, rules
from dsjax.config.other_trainers import TRAINERS, Trainer
from dsjax.config.other_trainers.datasets import TAGS
from dsjax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures(in_a_folder.__name__)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.name)
def test_every_key_of_ours_in_the_table_exists(trainer: Trainer):
    known = rules.keys(RunConfig)
    for name, key in trainer.keys.items():
        assert (key.fate in ("same", "read")) or not key.ours, name
        assert key.ours or key.note, name
        for path in key.ours.split(", ") if key.ours else ():
            section, dot, leaf = path.partition(".")
            assert section in known and (not dot or leaf in known[section]), name
    assert trainer.defaults.keys() <= trainer.keys.keys()


def test_a_lora_file_of_llama_factory_trains_the_same(capsys: pytest.CaptureFixture[str]):
    config, text = converted(LLAMA_FACTORY, capsys)
    expected = {
        "model.path": "deepseek-ai/deepseek-llm-7b-chat",
        "model.dtype": "bfloat16",
        "adapter.peft_type": "LORA",
        "adapter.r": 4,
        "adapter.lora_alpha": 8,  # twice the rank
        "adapter.lora_dropout": 0.0,
        "adapter.target_modules": "all-linear",
        "data.train": ["data/ours.json", "data/questions.jsonl"],
        "data.format": "alpaca",
        "data.column_mapping": {
            "instruction": "question",
            "input": "context",
            "output": "answer",
        },
        "data.max_length": 1000,
        "data.packing": False,
        "data.shuffle": True,
        "data.val_size": 0.1,
        "optimizer.optim": "adamw",
        "optimizer.learning_rate": 1e-4,
        "optimizer.lr_scheduler_type": "cosine",
        "optimizer.warmup_ratio": 0.1,
        "optimizer.weight_decay": 0.0,
        "optimizer.max_grad_norm": 1.0,
        "training.num_train_epochs": 3.0,
        "training.batch_size": 2 * 8 * 4,
        "training.gradient_accumulation_steps": 8,
        "training.eval_steps": 200,
        "training.seed": 42,
        "training.gradient_checkpointing": "full",
        "logging.report_to": [],
        "logging.logging_steps": 10,
        "checkpoint.save_steps": 500,
        "checkpoint.save_total_limit": None,
        "export.format": "peft",
        "output_dir": "saves/lora",
    }
    assert {path: value(config, path) for path in expected} == expected
    head = re.findall(r"^# {3}(\w+):", text, re.M)
    assert {"template", "max_samples", "cutoff_len", "lora_target"} <= set(head)
    assert {"trust_remote_code", "plot_loss", "ddp_timeout", "do_train"} <= set(head)


def test_no_key_is_passed_over(capsys: pytest.CaptureFixture[str]):
    quiet = {"neat_packing": False, "max_steps": -1, "fp16": False, "quantization_type": "nf4"}
    changes = quiet | {"eval_strategy": "no", "use_dora": False, "gradient_checkpointing": True}
    _, text = converted(LLAMA_FACTORY | changes, capsys)
    told = set(re.findall(r"^# {3}(\w+):", text, re.M))
    assert changes.keys() - {"eval_strategy"} | {"eval_steps"} <= told


def test_defaults_of_llama_factory_are_written_down(capsys: pytest.CaptureFixture[str]):
    tree = {"model_name_or_path": "m", "dataset": "ours", "output_dir": "o"}
    config, _ = converted(tree, capsys)
    assert (config.adapter.r, config.adapter.lora_alpha) == (8, 16)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_ratio) == (5e-5, 0.0)
    assert config.optimizer.lr_scheduler_type == "linear"
    assert (config.training.batch_size, config.training.num_train_epochs) == (8 * 4, 3.0)
    assert config.data.max_length == 2048


def test_defaults_of_trl_are_written_down(capsys: pytest.CaptureFixture[str]):
    config, text = converted(TRL, capsys)
    assert config.adapter.peft_type is None and config.export.format == "merged"
    assert (config.data.train, config.data.eval) == (["someone/rows"], None)
    assert (config.data.max_length, config.data.packing) == (1024, False)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_ratio) == (2e-5, 0.0)
    assert (config.model.dtype, config.model.param_dtype) == ("bfloat16", None)
    assert (config.training.batch_size, config.logging.logging_steps) == (8 * 4, 10)
    assert config.training.gradient_checkpointing == "full"
    assert "assistant_only_loss: not given: of a conversation TRL trains every token" in text

    config, text = converted(TRL | {"use_peft": True, "assistant_only_loss": True}, capsys)
    adapter = config.adapter
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (16, 32, 0.05)
    assert adapter.target_modules == ["q_proj", "v_proj"] and config.export.format == "peft"
    assert "every token" not in text


def test_what_is_not_the_same_is_told(capsys: pytest.CaptureFixture[str]):
    changes = {"use_peft": True, "lora_target_modules": ["all-linear"]}
    _, text = converted(TRL | changes | {"resume_from_checkpoint": "out/checkpoint-9"}, capsys)
    differs = text.partition("Nothing to set here")[0]
    assert "Not the same" in differs
    assert "lora_target_modules: " in differs and "leaves the routed ones out" in differs
    assert "resume_from_checkpoint: " in differs and "of theirs is not read" in differs


def test_an_upload_is_private_unless_the_file_says_otherwise(capsys: pytest.CaptureFixture[str]):
    pushed = {"push_to_hub": True, "hub_model_id": "someone/tuned"}
    config, text = converted(TRL | pushed, capsys)
    assert (config.export.push_to_hub, config.export.hub_private_repo) == ("someone/tuned", True)
    assert "hub_private_repo: not given: the repository is private, which theirs is not" in text
    config, _ = converted(TRL | pushed | {"hub_private_repo": False}, capsys)
    assert not config.export.hub_private_repo
    config, _ = converted(TRL | pushed | {"push_to_hub": False}, capsys)
    assert config.export.push_to_hub is None
    with pytest.raises(ConfigError, match="hub_model_id: got nothing, expected organization/name"):
        converted(TRL | {"push_to_hub": True}, capsys)


FACTORY_VALUES = [
    ({"dataset": "chats"}, {"data.train": ["someone/chats"], "data.format": "messages"}),
    ({"dataset": "chats"}, {"data.subset": "en", "data.split": "train_sft"}),
    ({"dataset": "turns"}, {"data.train": ["data/turns/*"], "data.format": "sharegpt"}),
    (
        {"dataset": "turns"},
        {"data.column_mapping": {"conversations": "dialogue", "system": "rules"}},
    ),
    ({"dataset": ["ours", "turns"]}, {"data.format": "auto"}),
    ({"eval_dataset": "ours", "val_size": None}, {"data.eval": ["data/ours.json"]}),
    ({"dataset_dir": "ONLINE", "dataset": "a/b"}, {"data.train": ["a/b"], "data.format": "alpaca"}),
    (
        {"stage": "pt", "dataset": "papers", "packing": False},
        {"data.format": "text", "data.column_mapping": {}, "data.packing": False},
    ),
    ({"finetuning_type": "full"}, {"adapter.peft_type": None, "export.format": "merged"}),
    ({"finetuning_type": "full", "pure_bf16": True}, {"model.param_dtype": "bfloat16"}),
    (
        {"quantization_bit": 4},
        {"model.quantization": "nf4", "model.quantization_double": True},
    ),
    ({"quantization_bit": 4, "double_quantization": False}, {"model.quantization_double": False}),
    (
        {"quantization_bit": 8},
        {"model.quantization": "int8", "model.quantization_double": False},
    ),
    ({"pure_bf16": True, "bf16": False}, {"model.dtype": "bfloat16", "model.param_dtype": None}),
    ({"bf16": False, "fp16": True}, {"model.dtype": "float16"}),
    ({"adapter_name_or_path": "old"}, {"adapter.path": "old", "adapter.peft_type": None}),
    ({"lora_target": "q_proj,v_proj"}, {"adapter.target_modules": ["q_proj", "v_proj"]}),
    ({"lora_alpha": 3, "use_rslora": True}, {"adapter.lora_alpha": 3, "adapter.use_rslora": True}),
    ({"loraplus_lr_ratio": 16.0}, {"adapter.loraplus_lr_ratio": 16.0}),
    ({"pissa_init": True}, {"adapter.init_lora_weights": "pissa_niter_16"}),
    ({"pissa_init": True, "pissa_iter": -1}, {"adapter.init_lora_weights": "pissa"}),
    ({"pissa_init": False, "pissa_iter": 4}, {"adapter.init_lora_weights": True}),
    (
        {"loraplus_lr_ratio": 4.0, "adapter_name_or_path": "old"},
        {"adapter.loraplus_lr_ratio": 4.0, "adapter.path": "old"},
    ),
    ({"packing": True}, {"data.packing": True}),
    ({"neat_packing": True}, {"data.packing": True}),
    ({"val_size": 100}, {"data.val_size": 100}),
    ({"disable_shuffling": True}, {"data.shuffle": False}),
    ({"disable_gradient_checkpointing": True}, {"training.gradient_checkpointing": "none"}),
    ({"max_steps": 7}, {"training.max_steps": 7}),
    ({"max_steps": -1}, {"training.max_steps": None}),
    ({"warmup_steps": 20}, {"optimizer.warmup_steps": 20}),
    ({"warmup_steps": 0}, {"optimizer.warmup_steps": None, "optimizer.warmup_ratio": 0.1}),
    ({"warmup_steps": 0.2}, {"optimizer.warmup_steps": None, "optimizer.warmup_ratio": 0.2}),
    ({"lr_scheduler_type": "constant"}, {"optimizer.lr_scheduler_type": "constant"}),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 2e-5}},
        {"optimizer.min_lr_ratio": 0.2},
    ),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.3}},
        {"optimizer.min_lr_ratio": 0.3},
    ),
    (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
        {"optimizer.num_cycles": 3},
    ),
    ({"optim": "lion_32bit"}, {"optimizer.optim": "lion"}),
    ({"optim": "adamw_torch_fused"}, {"optimizer.optim": "adamw"}),
    ({"report_to": ["tensorboard", "mlflow"]}, {"logging.report_to": ["tensorboard"]}),
    ({"report_to": "all"}, {"logging.report_to": ["tensorboard"]}),
    ({"eval_strategy": False}, {"training.eval_steps": None, "data.val_size": 0.1}),
    ({"eval_strategy": "epoch"}, {"training.eval_steps": None}),
    ({"eval_steps": None}, {"training.eval_steps": 10}),  # logging_steps
    ({"save_steps": 20.0, "save_total_limit": 2}, {"checkpoint.save_steps": 20}),
    ({"train_sampling_strategy": "sequential"}, {"data.shuffle": False}),
    ({"train_sampling_strategy": "group_by_length"}, {"data.shuffle": True}),
    ({"use_galore": False, "label_smoothing_factor": 0.0}, {"optimizer.optim": "adamw"}),
    ({"deepspeed": "ds_z3_config.json", "flash_attn": "fa2"}, {"model.attention": "auto"}),
]
TRL_VALUES = [
    ({"packing": True, "max_length": 4096}, {"data.packing": True, "data.max_length": 4096}),
    ({"max_seq_length": 512}, {"data.max_length": 512}),
    ({"dtype": "bfloat16"}, {"model.param_dtype": "bfloat16", "model.dtype": "bfloat16"}),
    ({"torch_dtype": "auto"}, {"model.param_dtype": "bfloat16"}),
    ({"torch_dtype": "bfloat16", "use_peft": True}, {"model.param_dtype": None}),
    ({"bf16": False}, {"model.dtype": "float32"}),
    ({"bf16": False, "dtype": "auto"}, {"model.dtype": "bfloat16"}),
    ({"max_grad_norm": None}, {"optimizer.max_grad_norm": None}),
    ({"evaluation_strategy": "epoch"}, {"data.eval": ["someone/rows"]}),
    ({"fp16": True}, {"model.dtype": "float16"}),
    ({"eval_strategy": "steps", "eval_steps": 5}, {"data.eval": ["someone/rows"]}),
    ({"dataset_config": "en", "dataset_train_split": "half"}, {"data.subset": "en"}),
    ({"dataset_train_split": "half"}, {"data.split": "half"}),
    ({"dataset_text_field": "body"}, {"data.column_mapping": {"text": "body"}}),
    ({"use_peft": True, "lora_target_modules": "all-linear"}, {"adapter.r": 16}),
    (
        {"use_peft": True, "lora_target_modules": ["all-linear"]},
        {"adapter.target_modules": "all-linear"},
    ),
    ({"use_peft": True, "use_rslora": True}, {"adapter.use_rslora": True}),
    (
        {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16"},
        {"model.quantization": "nf4", "model.quantization_double": False},
    ),
    (
        {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True},
        {"model.quantization_double": True},
    ),
    ({"use_peft": True, "load_in_8bit": True}, {"model.quantization": "int8"}),
    ({"use_peft": False, "lora_r": 64}, {"adapter.peft_type": None}),
    ({"gradient_checkpointing": False}, {"training.gradient_checkpointing": "none"}),
    ({"activation_checkpointing": True}, {"training.gradient_checkpointing": "full"}),
    (
        {
            "datasets": [{"path": "a/b"}, {"path": "json", "data_files": ["x.jsonl", "y.jsonl"]}],
            "test_split_size": 0.25,
        },
        {"data.train": ["a/b", "x.jsonl", "y.jsonl"], "data.val_size": 0.25},
    ),
    (
        {"datasets": [{"path": "a/b", "name": "en", "split": "half", "columns": ["messages"]}]},
        {"data.subset": "en", "data.split": "half"},
    ),
    ({"loss_type": "nll", "packing_strategy": "bfd"}, {"objective.type": "sft"}),
]


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [(LLAMA_FACTORY, *case) for case in FACTORY_VALUES] + [(TRL, *case) for case in TRL_VALUES],
)
def test_a_value_becomes_ours(
    base: dict[str, Any],
    change: dict[str, Any],
    expected: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
):
    config, _ = converted(base | change, capsys)
    found = {path: value(config, path) for path in expected}
    assert found == pytest.approx(expected) if _is_float(expected) else found == expected


def _is_float(expected: dict[str, Any]) -> bool:
    return all(isinstance(one, float) for one in expected.values())


def table(trainer: Trainer, names: list[str]) -> str:
    """The rows of a document's table: their keys, ours, the note; equal ones in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    fates = {"nothing": "nothing to set", "differs": "**not the same**", "refused": "**refused**"}
    for name in names:
        key = trainer.keys[name]
        ours = ", ".join(f"`{path}`" for path in key.ours.split(", ")) if key.ours else ""
        rows.setdefault((ours or fates.get(key.fate, ""), key.note), []).append(f"`{name}`")
    return "".join(
        f"| {', '.join(keys)} | {ours} | {note} |\n" for (ours, note), keys in rows.items()
    )


def test_the_document_has_every_key():
    document = (ROOT / "docs" / "from_other_trainers.md").read_text("utf-8")
    shared = [name for name in TRAINERS[0].keys if name in TRAINERS[1].keys]
    shared = [name for name in shared if TRAINERS[0].keys[name] == TRAINERS[1].keys[name]]
    for trainer in TRAINERS:
        assert table(trainer, shared) in document
        assert table(trainer, [name for name in trainer.keys if name not in shared]) in document
    assert all(name in document for name in TAGS)
