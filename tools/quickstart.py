# SPDX-License-Identifier: Apache-2.0
"""Quickstart: the whole way through dsjax with a tiny model, on any machine, without a network.

    make quickstart, or: python tools/quickstart.py [--seed N]

A made-up world is written down; a random model of DeepSeek-V3's shape, with latent attention and
routed experts, is trained on that text until it knows it; LoRA then teaches it to answer questions
that no sentence answers, about some of the people. It is asked about the others, whom no question
had named. Both exports are loaded again and asked the same. Everything is in `runs/quickstart`,
which every run starts afresh.

Exit 1 if the answers are not right, or differ after reloading. Not here: the world itself
(`quickstart_world`), training (`dsjax.train` with the two files in `configs/`).
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from dsjax.signals import end_at_once

    end_at_once()  # what is imported below takes seconds

from quickstart_world import (
    ASKED_ABOUT,
    CONFIG,
    Person,
    make_world,
    passages,
    questions,
    write_checkpoint,
    write_rows,
)

from dsjax import load_pretrained, train
from dsjax.data import encode_chat, encode_text, load_tokenizer
from dsjax.decoding.decode import generate
from dsjax.errors import run_command
from dsjax.export import command as export
from dsjax.models import Model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUN = Path("runs/quickstart")
BASE, MERGED, PEFT = RUN / "pretrain/export", RUN / "lora/export", RUN / "lora/adapter"
ENOUGH = 90.0
"""Per cent of the held-out questions that must be answered exactly."""


def main(argv: Sequence[str]) -> int:
    """Run the story; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train, tune, export and reload a tiny model.")
    parser.add_argument("--seed", type=int, default=0, help="of the world, weights and order")
    seed = parser.parse_args(argv).seed
    began = time.monotonic()

    say("1/6", "Inventing a world: its text, its questions, and a tiny V3 that knows nothing")
    world = make_world(seed)
    held_out = prepare(world, seed)

    say("2/6", "Full training on the text")
    code = run_training(CONFIGS / "quickstart_pretrain.yaml", seed)
    if code:
        return code

    say("3/6", "What the trained model knows, and what it makes of a question")
    base = load_pretrained(str(BASE), dtype="float32")
    known = know(base, world)
    print(f"facts of the text that it completes: {known:.1f} %")
    before = ask(base, held_out)
    show(held_out, before)

    say("4/6", f"LoRA on questions about {ASKED_ABOUT} people; the others are held out")
    code = run_training(CONFIGS / "quickstart.yaml", seed)
    if code:
        return code
    export.main(["--run", str(RUN / "lora"), "--out", str(PEFT), "--format", "peft"])

    say("5/6", "The base with the PEFT adapter, asked about the people held out")
    after = ask(load_pretrained(str(BASE), adapter=str(PEFT), dtype="float32"), held_out)
    show(held_out, after)

    say("6/6", "The merged model, loaded from its own folder, asked the same")
    merged = ask(load_pretrained(str(MERGED), dtype="float32"), held_out)
    same = sum(a == b for a, b in zip(after, merged, strict=True))
    print(f"same answers: {same} of {len(after)}")

    summarise(time.monotonic() - began)
    score = exact_match(held_out, after)
    print(f"exact match: {exact_match(held_out, before):.1f} % -> {score:.1f} %", flush=True)
    return verdict(score, same == len(after))


def say(step: str, text: str) -> None:
    """Print a heading."""
    print(f"\n==== {step}  {text}", flush=True)


def prepare(world: list[Person], seed: int) -> list[dict]:
    """Write text, questions and the random checkpoint; returns the held-out questions."""
    shutil.rmtree(RUN, ignore_errors=True)
    text = passages(world, seed)
    asked, held_out = questions(world[:ASKED_ABOUT]), questions(world[ASKED_ABOUT:])
    names = {fact.person for fact in world[ASKED_ABOUT:]}
    assert names.isdisjoint(word for row in asked for word in words_of(row))
    assert all(names & words_of(row) for row in held_out)
    write_rows(RUN / "data/world.jsonl", [{"text": passage} for passage in text])
    write_rows(RUN / "data/questions.jsonl", asked)
    write_rows(RUN / "data/held_out.jsonl", held_out)
    write_checkpoint(RUN / "start", text, seed)
    print(f"the text, in {len(text):,} passages such as: {text[0]}")
    print(f"{len(asked)} questions to learn from, {len(held_out)} held out, such as:")
    print(f"  {asked[0]['messages'][0]['content']}  {asked[0]['messages'][1]['content']}")
    return held_out


def words_of(row: dict) -> set[str]:
    """Return the words of a conversation, without punctuation."""
    text = " ".join(message["content"] for message in row["messages"])
    return set(text.replace(".", " ").replace("?", " ").split())


def run_training(config: Path, seed: int) -> int:
    """Train as the command does; returns its exit code."""
    words = ["--config", os.path.relpath(config), f"training.seed={seed}"]
    print(f"$ {python()} -m dsjax.train {' '.join(words)}", flush=True)
    return train.main(words)


def know(model: Model, world: Sequence[Person]) -> float:
    """Per cent of the text's facts that the model completes."""
    homes = {f"The home of {fact.person} is in": f" {fact.town}." for fact in world}
    towns = {f"The town of {fact.town} is in": f" {fact.land}." for fact in world}
    facts = homes | towns
    tokenizer = load_tokenizer(BASE)
    told = answer(model, [encode_text(tokenizer, start) for start in facts], limit=8)
    right = [text.startswith(end) for text, end in zip(told, facts.values(), strict=True)]
    return 100 * sum(right) / len(right)


def ask(model: Model, rows: Sequence[dict]) -> list[str]:
    """Put the question of every row through the chat template; returns the answers."""
    tokenizer = load_tokenizer(BASE)
    return answer(model, [encode_chat(tokenizer, row["messages"][:1]) for row in rows], limit=32)


def answer(model: Model, prompts: list[list[int]], limit: int) -> list[str]:
    """Continue prompts greedily, up to EOS."""
    tokenizer = load_tokenizer(BASE)
    rows = generate(model, prompts, max_new_tokens=limit, stop_ids={CONFIG["eos_token_id"]})
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def exact_match(rows: Sequence[dict], answers: Sequence[str]) -> float:
    """Per cent of answers that are, letter by letter, the expected ones."""
    right = [row["messages"][1]["content"] == text for row, text in zip(rows, answers, strict=True)]
    return 100 * sum(right) / len(right)


def show(rows: Sequence[dict], answers: Sequence[str]) -> None:
    """Print the first questions with their answers."""
    for row, text in list(zip(rows, answers, strict=True))[:3]:
        print(f"  {row['messages'][0]['content']}\n    -> {text}", flush=True)


def python() -> str:
    """Return this interpreter, as one would type it here."""
    beside = os.path.relpath(sys.executable)
    return sys.executable if beside.startswith("..") else beside


def summarise(seconds: float) -> None:
    """Say where everything is, and how to go on."""
    print(f"\nDone in {seconds:.0f} s. What is left behind:")
    for what, where in {
        "merged model": MERGED,
        "PEFT adapter": PEFT,
        "loss pictures": f"{RUN}/pretrain/training_loss.png, {RUN}/lora/training_loss.png",
    }.items():
        print(f"  {what:<14}{where}")
    command = f"{python()} -m dsjax"
    print("\nNext, with a model from the hub and your own data:")
    print(
        f"  {command}.train --config configs/r1_distill_qwen_7b_lora.yaml "
        "data.train=YOUR.jsonl output_dir=runs/yours"
    )
    print(f"  {command}.generate --model runs/yours/export --chat\n")


def verdict(score: float, same: bool) -> int:
    """Turn the results into an exit code, and say what is wrong."""
    problems = []
    if not score > ENOUGH:
        problems.append(f"exact match: got {score:.1f} %, expected more than {ENOUGH:.0f} %")
    if not same:
        problems.append("the merged model: got other answers than with the adapter, expected none")
    print("".join(f"error: {line}\n" for line in problems), end="", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run_command(main)
