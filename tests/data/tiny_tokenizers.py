# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers with the templates of each family.

The templates do what the published ones do, in words of our own: what they render is asserted in
test_data_chat.py, so a reader sees there how a family looks.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = (BOS, EOS, "<|EOT|>", "<|im_end|>")
ADDED = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")

SYSTEM_FIRST = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
)


def _deepseek(prompt: str, history: str = "", cut: str = "m.content.split('</think>')[-1]") -> str:
    """V3 and what came of it: `prompt` follows the assistant's mark when it is to speak."""
    return (
        SYSTEM_FIRST + "{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}"
        "{% if m.role == 'assistant' %}"
        "{{ '<｜Assistant｜>" + history + "' + (" + cut + ") + eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}" + prompt + "{% endif %}"
    )


def _deepseek_tools(prompt: str) -> str:
    """V3 and R1 with calls and results: a branch for null content, arguments as text, and the
    answer to a result without the assistant's mark."""
    call = "c.function.name + ':' + c.function.arguments"
    return (
        SYSTEM_FIRST + "{% set ns = namespace(tool=false) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% set ns.tool = false %}"
        "{% elif m.role == 'tool' %}{{ '<out>' + m.content + '</out>' }}{% set ns.tool = true %}"
        "{% elif m.role == 'assistant' and 'tool_calls' in m %}{% set ns.tool = false %}"
        "{% if m.content is none %}{{ '<｜Assistant｜>' }}"
        "{% else %}{{ '<｜Assistant｜>' + m.content }}{% endif %}"
        "{{ '<calls>' }}{% for c in m.tool_calls %}{{ " + call + " }}{% endfor %}"
        "{{ '</calls>' + eos_token }}"
        "{% elif m.role == 'assistant' %}"
        "{% if ns.tool %}{{ m.content + eos_token }}{% set ns.tool = false %}"
        "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt and not ns.tool %}{{ '<｜Assistant｜>' }}"
        + prompt
        + "{% endif %}"
    )


TEMPLATES = {
    "v3": _deepseek(""),
    "r1": _deepseek("{{ '<think>\n' }}"),
    "v31": _deepseek("{{ '<think>' if thinking else '</think>' }}", history="</think>"),
    "closed": _deepseek("{{ '</think>' }}", history="</think>"),
    "llm": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
    "{% else %}{{ 'Assistant: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "coder": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n' }}"
    "{% else %}{{ '### Response:\n' + m.content + '\n<|EOT|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}",
    "v3_tools": _deepseek_tools(""),
    "r1_tools": _deepseek_tools("{{ '<think>\n' }}"),
    "qwen": "{% for m in messages %}{{ 'user' if m.role == 'tool' else m.role }}{{ '\n' }}"
    "{% if m.role == 'tool' %}{{ '<out>' + m.content + '</out>' }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    '{{ \'<call>{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments|tojson }}{{ '}</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}",
    "chatml": "{% for m in messages %}"
    "{{ m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}",
}


def write_tokenizer(folder: Path, template: str | None, **settings: Any) -> Path:
    """Write a tokenizer of one token per byte, `:` + line break merged, the marks of DeepSeek."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, ":Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",  # as DeepSeek's files say
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
        **settings,
    }
    given = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder
