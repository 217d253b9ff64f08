# SPDX-License-Identifier: Apache-2.0
"""Trained answers without reasoning, where the chat template asks for it: counts, and what they do.

In: the prompt and the target of each trained answer. Out: which of three kinds it is, and lines for
the report. Only where a template writes `<think>` before an answer is there anything to count: V3's
cuts reasoning off as R1's does, but asks for none. After a tool's result R1's template writes no
mark; such an answer is not counted. Not here: prompts and targets (`chat`).
"""

from collections import Counter
from typing import NamedTuple

from dsjax.data.messages import CLOSE, OPEN
from dsjax.data.store import Example
from dsjax.data.template import Template, opens_reasoning

REASONED = "the prompt opens reasoning, and the answer has some"
AT_ONCE = "the prompt opens reasoning, and the answer closes it at once"
CLOSED = "the prompt closes reasoning"


class Answer(NamedTuple):
    """A trained answer of an example: the place of its first token, and its kind."""

    start: int
    kind: str


class Encoded(NamedTuple):
    """An example, and those of its trained answers that are of a kind."""

    example: Example
    answers: list[Answer]


def kind_of(template: Template, prompt: str, target: str) -> str | None:
    """Tell what a prompt asks for, and what the target does; None where it asks for nothing."""
    shown = prompt.rstrip()
    if shown.endswith(OPEN):
        return AT_ONCE if target.lstrip().startswith(CLOSE) else REASONED
    return CLOSED if shown.endswith(CLOSE) and opens_reasoning(template.tokenizer) else None


def lines(kinds: Counter[str]) -> list[str]:
    """Say how many answers are without reasoning, and what the model learns from them."""
    total = kinds.total()
    told = {
        AT_ONCE: f"the chat template opens {OPEN}, and the model learns {CLOSE} at once; what it "
        "should think first belongs in reasoning_content",
        CLOSED: f"the chat template puts {CLOSE} before them; they train its form that does not "
        f"think, and not the one that opens {OPEN}",
    }
    return [
        f"{kinds[kind]:,} of {total:,} answers are without reasoning: {text}"
        for kind, text in told.items()
        if kinds[kind]
    ]
