# SPDX-License-Identifier: Apache-2.0
"""Conversations as rows, and what is trained of them as readable text.

Trained parts stand between ⟦ and ⟧. `B` and `E` are BOS and EOS. Not here: tokenizers and templates
(tests/data/tiny_tokenizers.py).
"""

from dsjax.data import decode_sample
from dsjax.data.chat import chat_examples
from dsjax.data.formats import Chat, parse_row

REASONED = "<think>\nwhy\n</think>\n\nyes"


def conversation(*texts: str) -> dict:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[index % 2], "content": text} for index, text in enumerate(texts)
        ]
    }


def marked(tokenizer, row: dict) -> list[str]:
    """The sequences of a row as text, trained parts marked."""
    chat = parse_row(row, "messages", "f:1")
    assert isinstance(chat, Chat)
    texts = [decode_sample(made, tokenizer) for made, _ in chat_examples(tokenizer, chat, "f:1")]
    return [
        text.replace("<｜begin▁of▁sentence｜>", "B").replace("<｜end▁of▁sentence｜>", "E")
        for text in texts
    ]
