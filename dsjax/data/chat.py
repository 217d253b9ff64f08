# SPDX-License-Identifier: Apache-2.0
"""A conversation -> training sequences, through the checkpoint's own chat template.

In: a `Chat`. Out: one or more `Example`s, with their answers. Rule: the model is trained to
continue exactly what it will be shown at inference. For each trained assistant turn the prompt is
the template's rendering of the messages before it with the generation prompt, tokenised alone, as
at inference; the target is the turn's text and whatever closes the turn (EOS) in the template.

- No template of the family has `{% generation %}` marks, so masks come from where prompts end.
- R1's and V3.1's templates delete everything up to `</think>` from assistant messages, the last one
  included. The target keeps it; the prompts of later turns do not, as at inference.
- So a longer conversation need not begin with the tokens of the shorter one. Where it does, turns
  share one sequence; where it does not, a new sequence starts, whose earlier turns weigh nothing.
- What follows the last trained message is left out: nothing is predicted from it.
- Where the generation prompt opens `<think>` and the row has no reasoning, the target closes it
  empty (`</think>`, blank line, answer): the form in which R1 itself answers without thinking.

Not here: BOS rules and the tokenizer (`tokenizer`), how rows state messages (`formats`), counts of
answers without reasoning (`reasoning`).
"""

import re
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from dsjax.data.formats import Chat
from dsjax.data.messages import CLOSE, OPEN
from dsjax.data.readings import check_null, check_tool_results, readings, without_ends
from dsjax.data.reasoning import Answer, Encoded, kind_of
from dsjax.data.shown import Piece, Place, find_pieces
from dsjax.data.store import Example
from dsjax.data.template import (
    PROBE,
    EndlessError,
    Messages,
    RenderError,
    Template,
    stop_texts,
    turn_ending,
)
from dsjax.data.tokenizer import backend, bos_before, encode_text
from dsjax.errors import ConfigError, raise_all

MARKS = re.compile(r"(\s*</?think>)*\s*$")
LEADING_MARKS = re.compile(r"^(\s*</?think>)*\s*")
MOST_PROBLEMS = 8

Found = list[tuple[Piece, Place | None]]


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
    text = Template(tokenizer, "messages")(messages, generate=True, thinking=thinking)
    return encode_text(tokenizer, text)


def chat_examples(tokenizer: PreTrainedTokenizerFast, chat: Chat, origin: str) -> list[Encoded]:
    """Tokenise a conversation for training.

    Raises:
      ConfigError: the template is missing, refuses the row, or would not show what it holds.
    """
    Template(tokenizer, origin)
    chat = without_ends(chat, stop_texts(tokenizer), origin)
    errors: list[ConfigError] = []
    for reading in readings(chat):
        try:
            return _examples(Template(tokenizer, origin, reading.tools), reading)
        except EndlessError:
            raise
        except ConfigError as error:
            errors.append(error)
    # What a template leaves out says more than where it came to grief on another reading.
    raise next((error for error in errors if not isinstance(error, RenderError)), errors[0])


def _examples(template: Template, chat: Chat) -> list[Encoded]:
    """Tokenise one reading of a conversation; labels are the tokens, prompts weigh nothing."""
    check_null(template, chat)
    sequences: list[tuple[list[int], list[float], list[Answer]]] = []
    done = 0
    for turn in _turns(chat, template):
        ids, weights = _prompt_tokens(template, chat, turn, done)
        answers: list[Answer] = []
        if sequences and ids[: len(sequences[-1][0])] == sequences[-1][0]:
            _, earlier, answers = sequences.pop()
            weights[: len(earlier)] = earlier
        kind = kind_of(template, turn.prompt, turn.target) if turn.weight else None
        answers += [Answer(len(ids), kind)] if kind else []
        answer = encode_text(template.tokenizer, turn.target, add_bos=False)
        sequences.append((ids + answer, weights + [turn.weight] * len(answer), answers))
        done = turn.end
    check_tool_results(template, chat)
    return [
        Encoded(
            Example(
                np.array(ids, np.int32), np.array(ids, np.int32), np.array(weights, np.float32)
            ),
            answers,
        )
        for ids, weights, answers in sequences
    ]


def _turns(chat: Chat, template: Template) -> list[_Turn]:
    """List the trained turns; at the end also messages that are trained but not answered."""
    turns = [
        _assistant_turn(chat, index, template)
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant" and chat.weights[index]
    ]
    last = turns[-1].end + 1 if turns else 0
    if not turns or any(chat.weights[last:]):
        text = template(chat.messages)
        _check_shown(chat, template, find_pieces(template, chat.messages, text))
        turns.append(_Turn(len(chat.messages), text, "", 0.0, False))
    return turns


def _assistant_turn(chat: Chat, index: int, template: Template) -> _Turn:
    """Find the prompt before an assistant message and the text that inference would go on with."""
    before, message = chat.messages[:index], chat.messages[index]
    content = message["content"] or ""
    thinks = CLOSE in content
    if content.lstrip().startswith(OPEN) and not thinks:
        where = f"{template.origin} {chat.name(index)}"
        raise ConfigError(f"{where}: got {OPEN} without {CLOSE}, expected both or neither")
    prompt = _prompt(template, before, message, thinks)
    whole = template([*before, message], thinking=thinks)
    found = find_pieces(template, [*before, message], whole, thinking=thinks)
    own = [place for piece, place in found if piece.message == index]
    target = whole[len(prompt) :]
    spoken = all(place is not None and place.start >= len(prompt) for place in own)
    if spoken and whole.startswith(prompt) and content.strip() in target:
        end = max((place.end for place in own if place), default=len(prompt))
        target += _missing_end(template, whole[end:])
        shown = [(piece, place) for piece, place in found if piece.message < index]
    else:
        target = _built_target(chat, index, prompt, template)
        shown = find_pieces(template, before, prompt, generate=True, thinking=thinks)
    _check_shown(chat, template, shown)
    _check_ends_once(chat, index, target, template)
    return _Turn(index, prompt, target, chat.weights[index], thinks)


def _check_ends_once(chat: Chat, index: int, target: str, template: Template) -> None:
    """Refuse a turn that the template ends before it has said all (some do between calls)."""
    for stop in stop_texts(template.tokenizer):
        if target.count(stop) > 1:
            raise ConfigError(
                f"{template.origin} {chat.name(index)}: got a message that the chat template ends "
                f"{target.count(stop)} times with {stop}, expected once, for generation ends "
                "there; split its calls over several rows"
            )


def _prompt(template: Template, before: Messages, message: dict[str, Any], thinks: bool) -> str:
    """Return what inference shows before a message, which may be the first of all."""
    if before:
        return template(before, generate=True, thinking=thinks)
    head = template([{"role": message["role"], "content": PROBE}]).partition(PROBE)[0]
    try:
        prompt = template([], generate=True, thinking=thinks)
    except RenderError:  # it looks at the first message, and there is none
        return head
    return prompt if MARKS.sub("", head) == MARKS.sub("", prompt) else head


def _missing_end(template: Template, tail: str) -> str:
    """Return EOS where `tail`, all that follows what a turn says, does not end it."""
    ending = turn_ending(template.tokenizer)
    if ending is None:
        ended = bool(tail.strip())
    else:
        ends = [*stop_texts(template.tokenizer), ending.text.strip()]
        ended = any(end in tail for end in ends if end)
    return "" if ended else str(template.tokenizer.eos_token or "")


def _built_target(chat: Chat, index: int, prompt: str, template: Template) -> str:
    """Write the target ourselves, where the template does not render the turn as it was spoken."""
    where, message = f"{template.origin} {chat.name(index)}", chat.messages[index]
    content = message["content"] or ""
    head, closing = _around(chat, index, prompt, template)
    if MARKS.sub("", head) != MARKS.sub("", prompt):
        raise ConfigError(
            f"{where}: got a chat template whose generation prompt is not what it puts before this "
            "assistant message, expected one that the message follows; use a row without this turn"
        )
    lead = head[len(prompt) :] if head.startswith(prompt) else ""
    if CLOSE in content:
        return ("" if lead.strip() else lead) + _reasoned(content, prompt, where) + closing
    if prompt.rstrip().endswith(OPEN):
        return f"{prompt[len(prompt.rstrip()) :]}{CLOSE}\n\n{content}{closing}"
    if prompt.rstrip().endswith(CLOSE) and not head.startswith(prompt):
        return content + closing
    raise ConfigError(
        f"{where}.content: got text that the chat template changes, expected text that it shows "
        "as it is"
    )


def _around(chat: Chat, index: int, prompt: str, template: Template) -> tuple[str, str]:
    """Return what the template writes before and after an assistant's text, calls and EOS among it.

    Raises:
      ConfigError: the calls are not there.
    """
    before, message = chat.messages[:index], chat.messages[index]
    content = message["content"] or ""
    answer = content.rpartition(CLOSE)[2].strip()
    silent = "tool_calls" in message and not answer
    texts = [PROBE] if not silent else ["", None] if content else [message["content"]]
    lost: list[Piece] = []
    for text in texts:
        whole = template([*before, {**message, "content": text}])
        found = find_pieces(template, [*before, {**message, "content": text}], whole)
        own = [(piece, place) for piece, place in found if piece.message == index]
        lost = [piece for piece, place in own if place is None]
        if not lost:
            places = [place for _, place in own if place]
            ending = _missing_end(template, whole[max(place.end for place in places) :])
            if not silent:
                spoken = next(p for piece, p in own if piece.field == "content" and p)
                return whole[: spoken.start], whole[spoken.end :] + ending
            base = MARKS.sub("", prompt)
            rest = LEADING_MARKS.sub("", whole[len(base) :])
            return (base if whole.startswith(base) else whole), rest + ending
    _refuse(chat, template, lost)
    raise AssertionError("unreachable: there is a text, or a problem")


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
    template: Template, chat: Chat, turn: _Turn, done: int
) -> tuple[list[int], list[float]]:
    """Tokenise a prompt, and weigh the messages in it that are trained and not yet seen."""
    encoded = backend(template.tokenizer).encode(turn.prompt, add_special_tokens=False)
    weights = np.zeros(len(encoded.ids))
    for index in range(done, turn.end):
        weight = chat.weights[index]
        if weight and chat.messages[index]["role"] != "assistant":
            start, end = _span(chat, index, turn, template)
            offsets = np.array(encoded.offsets)
            weights[(offsets[:, 0] < end) & (offsets[:, 1] > start)] = weight
    bos = bos_before(template.tokenizer, encoded.ids)
    return bos + encoded.ids, [0.0] * len(bos) + weights.tolist()


def _span(chat: Chat, index: int, turn: _Turn, template: Template) -> tuple[int, int]:
    """Find a message's text in a prompt: between what stays when another text takes its place."""
    messages = chat.messages[: turn.end]
    messages[index] = {**messages[index], "content": PROBE}
    generate = turn.end < len(chat.messages)
    probe = template(messages, generate=generate, thinking=turn.thinking)
    head, _, tail = probe.partition(PROBE)
    start, end = len(head), len(turn.prompt) - len(tail)
    if turn.prompt[start:end].strip() != chat.messages[index]["content"].strip():
        raise ConfigError(
            f"{template.origin} {chat.name(index)}.loss_weight: got a weight for a message whose "
            "text the chat template changes or moves, expected one that it shows as it is; set "
            "loss_weight to 0"
        )
    return start, end


def _check_shown(chat: Chat, template: Template, found: Found) -> None:
    """Refuse a row of which a prompt leaves out anything but what is trained, or was thought."""
    lost = [piece for piece, place in found if place is None and not _may_be_left_out(chat, piece)]
    _refuse(chat, template, lost)


def _refuse(chat: Chat, template: Template, lost: list[Piece]) -> None:
    problems = dict.fromkeys(_problem(chat, template, piece) for piece in lost)
    raise_all(list(problems)[:MOST_PROBLEMS])


def _may_be_left_out(chat: Chat, piece: Piece) -> bool:
    if piece.message < 0 or chat.messages[piece.message]["role"] != "assistant":
        return False
    return piece.field == "reasoning" or chat.weights[piece.message] != 0


def _problem(chat: Chat, template: Template, piece: Piece) -> str:
    """Say of a piece that it would be lost, and why if that can be told."""
    where = f"{template.origin} {chat.field(piece.message, piece.field)}"
    if piece.message < 0:
        return (
            f"{template.origin} tools: got tool definitions, expected none, for the chat template "
            "does not show them; write them into the system message"
        )
    if piece.field.startswith("tool_calls"):
        does = "leaves out or changes" if "tool_calls" in template.source else "has no branch for"
        return (
            f"{where}: got a call that the chat template {does}, expected one that it shows as it "
            "is; use a template that does, or write the call into the content"
        )
    if piece.field == "name":
        return (
            f"{where}: got a name that the chat template does not show, expected none; write it "
            "into the content"
        )
    role = chat.messages[piece.message]["role"]
    said = f"{'an' if role == 'assistant' else 'a'} {role} message"
    return (
        f"{where}: got {said} that the chat template leaves out or changes, expected one that it "
        "shows; put its text into a message of another role"
    )
