# SPDX-License-Identifier: Apache-2.0
"""The training loop that dsjax must reproduce, written by hand in torch, PEFT and transformers.

In: a torch model, the rows of a `format: tokens` file and the very config that dsjax is given.
Out: loss, gradient norm and learning rate of every step; the model is trained in place.
Not here: anything of dsjax.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

Row = dict[str, list[int]]

# The name patterns by which transformers' Trainer spares parameters from weight decay.
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def write_rows(path: Path, vocab_size: int, count: int, seed: int = 3) -> Path:
    """Write rows of different lengths: without labels, with a masked prompt, with random gaps."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        length = int(rng.integers(6, 28))
        ids = rng.integers(0, vocab_size, length).tolist()
        row: Row = {"input_ids": ids}
        if number % 3 == 1:
            prompt = int(rng.integers(1, length - 2))
            row["labels"] = [-100] * prompt + ids[prompt:]
        elif number % 3 == 2:
            row["labels"] = [token if rng.random() < 0.6 else -100 for token in ids]
            row["labels"][-1] = ids[-1]
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def read_rows(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{"labels": row["input_ids"]} | row for row in rows]


def iterate_batches(rows: list[Row], batch_size: int) -> Iterator[list[Row]]:
    """Rows in file order, again and again; the last batch of an epoch may be short."""
    while True:
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def pad(rows: list[Row]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), -100),
    }
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][index, :size] = torch.tensor(row["input_ids"])
        batch["attention_mask"][index, :size] = 1
        batch["labels"][index, :size] = torch.tensor(row["labels"])
    return batch


def trained_tokens(rows: list[Row]) -> int:
    """How many tokens have a loss: the first of a row has nothing before it to predict it."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def loss_sum(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    batch = pad(rows)
    labels = batch.pop("labels")
    logits = model(**batch).logits.float()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def make_optimizer(model: torch.nn.Module, section: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW with the two groups of transformers' Trainer."""
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], NO_DECAY))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in named if name in decayed],
            "weight_decay": section["weight_decay"],
        },
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=section["learning_rate"],
        betas=(section.get("adam_beta1", 0.9), section.get("adam_beta2", 0.999)),
        eps=section.get("adam_epsilon", 1e-8),
    )


def make_loraplus(model: torch.nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW with the groups that PEFT makes for LoRA+."""
    section = config["optimizer"]
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=section["learning_rate"],
        loraplus_lr_ratio=config["adapter"]["loraplus_lr_ratio"],
        loraplus_weight_decay=section["weight_decay"],
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, section: Mapping[str, Any], steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    warmup = section.get("warmup_steps")
    if warmup is None:
        warmup = math.ceil(steps * section.get("warmup_ratio", 0.03))
    name, extra = section["lr_scheduler_type"], {}
    if "num_cycles" in section:
        extra = {"num_cycles": section["num_cycles"]}
    if section.get("min_lr_ratio"):
        name, extra = "cosine_with_min_lr", {"min_lr_rate": section["min_lr_ratio"]}
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=extra,
    )


def train(
    model: torch.nn.Module, rows: list[Row], config: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Train `model` in place; the loss is the token mean over the whole optimizer batch."""
    section, training = config["optimizer"], config["training"]
    steps, pieces = training["max_steps"], training.get("gradient_accumulation_steps", 1)
    ratio = config["adapter"].get("loraplus_lr_ratio")
    optimizer = make_optimizer(model, section) if ratio is None else make_loraplus(model, config)
    schedule = make_schedule(optimizer, section, steps)
    batches = iterate_batches(rows, training["batch_size"])
    micro = training["batch_size"] // pieces
    model.train()
    history = []
    for _ in range(steps):
        batch = next(batches)
        count, total = trained_tokens(batch), 0.0
        for start in range(0, len(batch), micro):
            loss = loss_sum(model, batch[start : start + micro]) / count
            loss.backward()
            total += loss.item()
        parameters = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, section["max_grad_norm"])
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append({"loss": total, "grad_norm": norm.item(), "learning_rate": rate})
    model.eval()
    return history
