# SPDX-License-Identifier: Apache-2.0
"""A conversation -> training sequences, through the checkpoint's own chat template.

In: a `Chat`. Out: one or more `Example`s. Rule: the model is trained to continue exactly what it
will be shown at inference. For each trained assistant turn the prompt is the template's rendering
of the messages before it with the generation prompt, tokenised alone, as at inference; the target
is the turn's text and whatever closes the turn (EOS) in the template.

- No template of the family has `{% generation %}` marks, so masks come from where prompts end.
- R1's and V3.1's templates delete everything up to `</think>` from assistant messages, the last one
  included. The target keeps it; the prompts of later turns do not, as at inference.
- So a longer conversation need not begin with the tokens of the shorter one. Where it does, turns
  share one sequence; where it does not, a new sequence starts, whose earlier turns weigh nothing.
- What follows the last trained message is left out: nothing is predicted from it.
- Where the generation prompt opens `<think>` and the row has no reasoning, the target closes it
  empty (`</think>`, blank line, answer): the form in which R1 itself answers without thinking.

Not here: BOS rules and the tokenizer (`tokenizer`), how rows state messages (`formats`).
"""

import re
from typing import NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerFast

from dsjax.data.formats import Chat
from dsjax.data.store import Example
from dsjax.data.tokenizer import backend, bos_before, encode_text
from dsjax.errors import ConfigError

OPEN, CLOSE = "<think>", "</think>"
PROBE = "dsjax-probe-of-the-template"
MARKS = re.compile(r"(\s*</?think>)*\s*$")


class _Renderer:
    """The chat template, bound to one row for its error messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tools: list | None, origin: str):
        self._tokenizer, self._tools, self._origin = tokenizer, tools, origin
        self.eos = str(tokenizer.eos_token or "")

    def __call__(self, messages: list[dict], generate: bool = False, thinking: bool = False) -> str:
        """Render messages as text; `thinking` is read by V3.1's template alone."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=self._tools,
                tokenize=False,
                add_generation_prompt=generate,
                thinking=thinking,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self._origin}: got a conversation that the chat template refuses ({error}), "
                "expected one that it renders; check the order of the roles"
            ) from error
        return str(text)


class _Turn(NamedTuple):
    """What inference shows before message `end`, and what follows it in training."""

    end: int
    prompt: str
    target: str
    weight: float
    thinking: bool


def encode_chat(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict], thinking: bool = False
) -> list[int]:
    """Tokenise a conversation up to where the assistant answers, as training shows it.

    Args:
      tokenizer: from `load_tokenizer`, with a chat template.
      messages: `role` and `content` each.
      thinking: for templates that ask (V3.1): open the reasoning instead of closing it.
    """
    text = _renderer(tokenizer, Chat(messages, []), "messages")(
        messages, generate=True, thinking=thinking
    )
    return encode_text(tokenizer, text)


def chat_examples(tokenizer: PreTrainedTokenizerFast, chat: Chat, origin: str) -> list[Example]:
    """Tokenise a conversation for training.

    Raises:
      ConfigError: the template is missing, refuses the row, or would not show what it holds.
    """
    render = _renderer(tokenizer, chat, origin)
    sequences: list[tuple[list[int], list[float]]] = []
    done = 0
    for turn in _turns(chat, render, origin):
        ids, weights = _prompt_tokens(tokenizer, chat, turn, done, render, origin)
        if sequences and ids[: len(sequences[-1][0])] == sequences[-1][0]:
            earlier = sequences.pop()[1]
            weights[: len(earlier)] = earlier
        answer = encode_text(tokenizer, turn.target, add_bos=False)
        sequences.append((ids + answer, weights + [turn.weight] * len(answer)))
        done = turn.end
    return [
        Example(np.array(ids, np.int32), np.array(ids, np.int32), np.array(weights, np.float32))
        for ids, weights in sequences
    ]


def _turns(chat: Chat, render: _Renderer, origin: str) -> list[_Turn]:
    """List the trained turns; at the end also messages that are trained but not answered."""
    turns = [
        _assistant_turn(chat, index, render, f"{origin} messages[{index}]")
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant" and chat.weights[index]
    ]
    last = turns[-1].end + 1 if turns else 0
    if not turns or any(chat.weights[last:]):
        turns.append(_Turn(len(chat.messages), render(chat.messages), "", 0.0, False))
    _check_shown(chat, turns[-1], origin)
    return turns


def _assistant_turn(chat: Chat, index: int, render: _Renderer, where: str) -> _Turn:
    """Find the prompt before an assistant message and the text that inference would go on with."""
    before, message = chat.messages[:index], chat.messages[index]
    content = message["content"]
    thinks = CLOSE in content
    if content.lstrip().startswith(OPEN) and not thinks:
        raise ConfigError(f"{where}: got {OPEN} without {CLOSE}, expected both or neither")
    prompt = render(before, generate=True, thinking=thinks)
    whole = render([*before, message], thinking=thinks)
    target = whole[len(prompt) :]
    if whole.startswith(prompt) and content.strip() in target:
        target += "" if _closes(target, content.strip()) else render.eos
    else:
        target = _built_target(before, content, prompt, render, where)
    return _Turn(index, prompt, target, chat.weights[index], thinks)


def _closes(target: str, content: str) -> bool:
    """Say whether the template puts anything but white space after the turn's text."""
    return bool(target[target.rindex(content) + len(content) if content else 0 :].strip())


def _built_target(
    before: list[dict], content: str, prompt: str, render: _Renderer, where: str
) -> str:
    """Write the target ourselves, where the template does not render the turn as it was spoken."""
    probe = render([*before, {"role": "assistant", "content": PROBE}])
    head, found, closing = probe.partition(PROBE)
    if not found or MARKS.sub("", head) != MARKS.sub("", prompt):
        raise ConfigError(
            f"{where}: got a chat template whose generation prompt is not what it puts before an "
            "assistant message, expected one that the message follows; use a row without this turn"
        )
    lead = head[len(prompt) :] if head.startswith(prompt) else ""
    end = closing if closing.strip() else closing + render.eos
    if CLOSE in content:
        return ("" if lead.strip() else lead) + _reasoned(content, prompt, where) + end
    if prompt.rstrip().endswith(OPEN):
        return f"{prompt[len(prompt.rstrip()) :]}{CLOSE}\n\n{content}{end}"
    raise ConfigError(
        f"{where}.content: got text that the chat template changes, expected text that it shows "
        "as it is"
    )


def _reasoned(content: str, prompt: str, where: str) -> str:
    """Return reasoning, `</think>` and answer, with `<think>` unless the prompt has it already."""
    if prompt.rstrip().endswith(CLOSE):
        raise ConfigError(
            f"{where}.content: got reasoning, expected none, for the chat template's generation "
            f"prompt ends with {CLOSE}; take the reasoning out, or use a template that opens it"
        )
    opens = content.lstrip().startswith(OPEN)
    if not prompt.rstrip().endswith(OPEN):
        return content if opens else f"{OPEN}\n{content}"
    if not opens:
        return content
    rest = content.lstrip().removeprefix(OPEN)
    return rest.removeprefix("\n") if prompt.endswith("\n") else rest


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerFast,
    chat: Chat,
    turn: _Turn,
    done: int,
    render: _Renderer,
    origin: str,
) -> tuple[list[int], list[float]]:
    """Tokenise a prompt, and weigh the messages in it that are trained and not yet seen."""
    encoded = backend(tokenizer).encode(turn.prompt, add_special_tokens=False)
    weights = np.zeros(len(encoded.ids))
    for index in range(done, turn.end):
        weight = chat.weights[index]
        if weight and chat.messages[index]["role"] != "assistant":
            start, end = _span(chat, index, turn, render, f"{origin} messages[{index}]")
            offsets = np.array(encoded.offsets)
            weights[(offsets[:, 0] < end) & (offsets[:, 1] > start)] = weight
    bos = bos_before(tokenizer, encoded.ids)
    return bos + encoded.ids, [0.0] * len(bos) + weights.tolist()


def _span(chat: Chat, index: int, turn: _Turn, render: _Renderer, where: str) -> tuple[int, int]:
    """Find a message's text in a prompt: between what stays when another text takes its place."""
    messages = chat.messages[: turn.end]
    messages[index] = {**messages[index], "content": PROBE}
    generate = turn.end < len(chat.messages)
    probe = render(messages, generate=generate, thinking=turn.thinking)
    head, _, tail = probe.partition(PROBE)
    start, end = len(head), len(turn.prompt) - len(tail)
    if turn.prompt[start:end].strip() != chat.messages[index]["content"].strip():
        raise ConfigError(
            f"{where}.loss_weight: got a weight for a message whose text the chat template changes "
            "or moves, expected one that it shows as it is; set loss_weight to 0"
        )
    return start, end


def _check_shown(chat: Chat, turn: _Turn, origin: str) -> None:
    """Refuse a row of which the template leaves a message out."""
    for index, message in enumerate(chat.messages[: turn.end]):
        shown = message["content"].strip() in turn.prompt
        if message["role"] in ("system", "user") and not shown:
            raise ConfigError(
                f"{origin} messages[{index}]: got a {message['role']} message that the chat "
                "template leaves out or changes, expected one that it shows; put its text into a "
                "user message"
            )


def _renderer(tokenizer: PreTrainedTokenizerFast, chat: Chat, origin: str) -> _Renderer:
    template = tokenizer.chat_template
    if not template:
        raise ConfigError(
            f"{origin}: got a conversation and a tokenizer without chat template, expected "
            "`chat_template` in tokenizer_config.json or a chat_template.jinja beside it; use the "
            "instruct model's, or rows of the format prompt_completion or text"
        )
    if chat.tools and "tools" not in str(template):
        raise ConfigError(
            f"{origin} tools: got tool definitions, expected none, for the chat template does not "
            "show them; write them into the system message"
        )
    return _Renderer(tokenizer, chat.tools, origin)
