# SPDX-License-Identifier: Apache-2.0
"""The quickstart as a user runs it, without torch; then its exports, as others load them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; "
    f"sys.path.insert(0, {str(ROOT / 'tools')!r}); "
    f"runpy.run_path({str(ROOT / 'tools/quickstart.py')!r}, run_name='__main__')"
)
ASKED = 6  # questions that torch answers too; all of them would only take longer


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the quickstart ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=folder,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""},  # as fast as a user's
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/quickstart", done.stdout


def test_exact_match_rises_on_held_out_questions(quickstart):
    _, printed = quickstart
    last = printed.splitlines()[-1]
    found = re.fullmatch(r"exact match: ([\d.]+) % -> ([\d.]+) %", last)
    assert found, last
    assert float(found[1]) < 5 and float(found[2]) > 90
    assert "same answers: 120 of 120" in printed


def test_it_leaves_pictures_and_exports_behind(quickstart):
    run, _ = quickstart
    files = ["pretrain/training_loss.png", "lora/training_loss.png", "lora/export/config.json"]
    assert [
        name for name in [*files, "lora/adapter/adapter_config.json"] if not (run / name).is_file()
    ] == []


def test_it_is_a_v3_whose_correction_biases_moved_in_full_training_alone(quickstart):
    run, _ = quickstart
    folders = [run / name for name in ("start", "pretrain/export", "lora/export")]
    kinds = [json.loads((f / "config.json").read_text("utf-8"))["model_type"] for f in folders]
    assert kinds == ["deepseek_v3"] * 3
    start, base, merged = [load_file(folder / "model.safetensors") for folder in folders]
    biases = [name for name in start if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for name in biases:
        assert not torch.equal(start[name], base[name])
        assert torch.equal(base[name], merged[name])


def test_transformers_and_peft_give_the_same_answers(quickstart):
    run, _ = quickstart
    lines = (run / "data/held_out.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:ASKED]]
    merged = AutoModelForCausalLM.from_pretrained(run / "lora/export")
    base = AutoModelForCausalLM.from_pretrained(run / "pretrain/export")
    answers = ask(merged, run / "lora/export", rows)
    assert answers == ask(
        PeftModel.from_pretrained(base, run / "lora/adapter"), run / "lora/export", rows
    )
    right = [row["messages"][1]["content"] == text for row, text in zip(rows, answers, strict=True)]
    assert sum(right) >= ASKED - 1


@torch.no_grad()
def ask(model: PreTrainedModel, directory: Path, rows: list[dict]) -> list[str]:
    """Greedy answers by transformers, one question at a time."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    answers = []
    for row in rows:
        text = tokenizer.apply_chat_template(
            row["messages"][:1], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers
