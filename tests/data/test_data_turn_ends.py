# SPDX-License-Identifier: Apache-2.0
"""The token that ends a turn: found in the template, once in a turn, never inside a text."""

import re

import pytest
from conversations import conversation, marked
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import EOS

from dsjax.data import turn_ending
from dsjax.data.chat import chat_examples
from dsjax.data.formats import Chat, parse_row
from dsjax.errors import ConfigError


def test_eos_is_trained_though_it_is_the_padding_token(tokenizers):
    tokenizer = tokenizers["v3"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ((made, _),) = chat_examples(tokenizer, Chat(conversation("a", "b")["messages"], [0, 1]), "f:1")
    assert made.input_ids[-1] == tokenizer.eos_token_id and made.loss_weights[-1] == 1


def test_a_template_that_closes_no_turn_gets_eos(with_template):
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert marked(tokenizer, conversation("a", "b")) == ["[user]a[assistant]⟦bE⟧"]
    assert marked(tokenizer, conversation("a", "")) == ["[user]a[assistant]⟦E⟧"]


def test_eos_stands_once_whatever_a_text_ends_in(tokenizers):
    for content in (">", "b>", f"b{EOS}", f"b{EOS}{EOS}\n", EOS, "<｜end▁of▁sentence｜"):
        for family in ("v3", "r1", "llm"):
            (text,) = marked(tokenizers[family], conversation("is > 2?", content))
            assert text.count("E") == 1 and text.endswith("E⟧"), (family, content)
    for content in ("b<|EOT|>", "b\n<|EOT|>\n"):
        (text,) = marked(tokenizers["coder"], conversation("a", content))
        assert text.count("<|EOT|>") == 1 and text.endswith("\n<|EOT|>\n⟧")


@pytest.mark.parametrize(
    ("family", "question", "answer", "field"),
    [
        ("v3", "a", f"b{EOS}c", "messages[1].content"),
        ("v3", f"a{EOS}", "b", "messages[0].content"),
        ("r1", "a", f"<think>w{EOS}</think>b", "messages[1].reasoning"),
        ("coder", "a", "b<|EOT|>c", "messages[1].content"),
    ],
)
def test_what_would_end_generation_inside_a_text_is_refused(
    tokenizers, family, question, answer, field
):
    with pytest.raises(ConfigError, match=r"^f:1 " + re.escape(field) + r": got text with <"):
        marked(tokenizers[family], conversation(question, answer))


PIECES = st.lists(
    st.sampled_from(("a", ">", " ", "\n", EOS, EOS[:-1], "<|EOT|>", "<", "</think>", "é")),
    max_size=5,
).map("".join)


def check_one_ending(tokenizers, family: str, question: str, answer: str) -> None:
    stop = "<|EOT|>" if family == "coder" else EOS
    tokenizer = tokenizers[family]
    try:
        chat = parse_row(conversation(question, answer), "messages", "f:1")
        ((made, _),) = chat_examples(tokenizer, chat, "f:1")
    except ConfigError as error:
        assert str(error).startswith("f:1 messages[")
        return
    ids = made.input_ids.tolist()
    at = ids.index(tokenizer.convert_tokens_to_ids(stop))
    assert made.loss_weights[at] == 1 and stop not in question
    assert sum(ids.count(tokenizer.convert_tokens_to_ids(text)) for text in {stop, EOS}) == 1
    assert not str(tokenizer.decode(ids[at + 1 :])).strip()


FAMILIES = st.sampled_from(("v3", "r1", "v31", "llm", "coder", "chatml"))


@settings(max_examples=60, deadline=None)
@given(FAMILIES.filter(lambda family: family != "chatml"), PIECES, PIECES)
def test_a_turn_ends_once_and_at_its_end(tokenizers, family, question, answer):
    check_one_ending(tokenizers, family, question, answer)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(FAMILIES.filter(lambda family: family != "chatml"), PIECES, PIECES)
def test_a_turn_ends_once_in_many_cases(tokenizers, family, question, answer):
    check_one_ending(tokenizers, family, question, answer)


@pytest.mark.parametrize(
    ("closing", "ending"),
    [
        ("{{ eos_token }}", "E"),
        ("<|EOT|>\n", "<|EOT|>"),
        ("<|im_end|>{{ eos_token }}", "E"),
        ("", None),
        ("[/A]", None),
    ],
)
def test_the_token_that_ends_turns_is_found_in_the_template(with_template, closing, ending):
    tokenizer = with_template("{% for m in messages %}[{{ m.content }}" + closing + "{% endfor %}")
    found = turn_ending(tokenizer)
    assert found is not None
    text = found.token and tokenizer.convert_ids_to_tokens(found.token)
    assert text == (EOS if ending == "E" else ending)
    assert turn_ending(with_template("{{ 1 // 0 }}")) is None
    assert turn_ending(with_template(None)) is None
