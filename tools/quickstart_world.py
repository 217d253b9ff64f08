# SPDX-License-Identifier: Apache-2.0
"""The quickstart's made-up world: its text, its questions, and a model that knows nothing yet.

In: a seed. Out: people who live in towns that are in lands; passages that tell who lives where and
which town is in which land; questions that need both; and a small random checkpoint of
DeepSeek-V3's shape with a tokenizer, in Hugging Face's format. No passage says in which land a
person lives.
Not here: training, asking, judging (`quickstart`).
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsjax.models import base_shapes, build, entries_of
from dsjax.models.weight_rules import entry_shape
from dsjax.weights.safetensors import SafetensorsWriter

PEOPLE, TOWNS, LANDS = 160, 24, 6
ASKED_ABOUT = 120
"""People whom the training questions ask about; the held-out questions are about all others."""
PASSAGES = 12
"""Passages about each person."""

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
TOWN_ENDS = ("burg", "dale", "ford", "mouth", "ton", "wick")
LAND_ENDS = ("lia", "mark", "nia", "ria", "stan", "via")
TRADES = ("baker", "carpenter", "doctor", "farmer", "miller", "painter", "sailor", "weaver")

# A name never begins a sentence: with and without the space before it, it would be two tokens.
HOMES = ("The home of {person} is in {town}.", "In the town of {town} lives {person}.")
WORK = ("The {trade} is called {person}.", "They say that {person} is a {trade}.")
TALK = (
    "Somebody asks about {person}.",
    "You have surely heard of {person}.",
    "What do we know of {person}?",
    "Please tell me who {person} is.",
    "In which house does {person} live?",
    "This is the story of {person}.",
)
PLACES = ("The town of {town} is in {land}.", "Many roads lead to {town}, in {land}.")
QUESTIONS = (
    "In which land does {person} live?",
    "What is the land of {person}?",
    "Please tell me which land is the home of {person}.",
)
ANSWER = "The home of {person} is in {town}, in {land}."

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CHAT_TEMPLATE = f"""\
{{{{- bos_token -}}}}
{{%- for message in messages -%}}
{{%- if message.role == 'user' -%}}{{{{- '{USER}' + message.content -}}}}
{{%- elif message.role == 'assistant' -%}}{{{{- '{ASSISTANT}' + message.content + eos_token -}}}}
{{%- else -%}}{{{{- message.content -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '{ASSISTANT}' -}}}}{{%- endif -%}}
"""

# All parts of DeepSeek-V3 but multi-token prediction, which transformers leaves out.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 896,
    "hidden_size": 128,
    "intermediate_size": 352,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "attention_bias": False,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Person:
    """What is true of one person."""

    person: str
    trade: str
    town: str
    land: str


def make_world(seed: int) -> list[Person]:
    """Invent people, towns and lands; every town has about as many people, every land towns."""
    rng = np.random.default_rng(seed)
    starts = ["".join(pair).capitalize() for pair in itertools.product(CONSONANTS, VOWELS)]
    names = [a + b.lower() for a, b in itertools.product(starts, starts)]
    people = rng.permutation(names)[:PEOPLE].tolist()
    towns = [str(start + rng.choice(TOWN_ENDS)) for start in rng.permutation(starts)[:TOWNS]]
    lands = [a + b for a, b in zip(rng.permutation(starts)[:LANDS], LAND_ENDS, strict=True)]
    trades = rng.choice(TRADES, PEOPLE).tolist()
    return [
        Person(person, trade, towns[i % TOWNS], lands[i % TOWNS % LANDS])
        for i, (person, trade) in enumerate(zip(people, trades, strict=True))
    ]


def passages(world: Sequence[Person], seed: int) -> list[str]:
    """Write the text that full training reads, each fact in several wordings."""
    rng = np.random.default_rng([seed, 1])
    towns = {fact.town: fact for fact in world}
    share = PASSAGES * PEOPLE // TOWNS // 2
    lines = [
        _passage(rng, (HOMES, WORK, TALK, HOMES), fact) for fact in world for _ in range(PASSAGES)
    ]
    lines += [_passage(rng, (PLACES, PLACES), towns[t]) for t in towns for _ in range(share)]
    lines = [lines[place] for place in rng.permutation(len(lines))]
    # Half of them in twos: what is known must not depend on what stands before it.
    alone, rest = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    together = [" ".join(pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
    return alone + together


def _passage(rng: np.random.Generator, kinds: Iterable[Sequence[str]], fact: Person) -> str:
    sentences = [str(rng.choice(forms)) for forms in kinds]
    return " ".join(rng.permutation(sentences)).format(**vars(fact))


def questions(people: Sequence[Person]) -> list[dict[str, Any]]:
    """Ask for the land of each person, in every wording; rows of the format `messages`."""
    return [
        {
            "messages": [
                {"role": "user", "content": question.format(**vars(fact))},
                {"role": "assistant", "content": ANSWER.format(**vars(fact))},
            ]
        }
        for fact in people
        for question in QUESTIONS
    ]


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_checkpoint(directory: Path, text: Sequence[str], seed: int) -> None:
    """Write a checkpoint of random weights, with a tokenizer made from the text."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")
    _write_tokenizer(directory, text)
    model = build(CONFIG, "float32")
    shapes = base_shapes(model)
    rng = np.random.default_rng([seed, 2])
    entries = [(entry.hf, "F32", entry_shape(entry, shapes)) for entry in entries_of(model)]
    with SafetensorsWriter(directory / "model.safetensors", entries) as writer:
        for name, _, shape in entries:
            writer.append(name, _start(rng, name, shape).astype(np.float32))


def _start(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return what a tensor holds before any training; routers' biases begin at 0."""
    if name.endswith("norm.weight"):
        return np.ones(shape)
    if name.endswith("e_score_correction_bias"):
        return np.zeros(shape)
    return rng.normal(0.0, shape[-1] ** -0.5, shape)


def _write_tokenizer(directory: Path, text: Sequence[str]) -> None:
    """Byte-level BPE, DeepSeek's kind, with DeepSeek's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS, EOS, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asked = [question.format(person="") for question in QUESTIONS]
    tokenizer.train_from_iterator([*text, *asked], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    text_of = json.dumps(settings, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text_of + "\n", "utf-8")
