# SPDX-License-Identifier: Apache-2.0
"""Rows that a chat template would falsify, and templates that fail: refused by row and message."""

import pytest
from conversations import REASONED, conversation, marked

from dsjax.errors import ConfigError

CHANGES_TEXT = (
    "{% for m in messages %}[{{ m.content|upper }}]{% endfor %}"
    "{% if add_generation_prompt %}[{% endif %}"
)
OTHER_PROMPT = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}speak:{% endif %}"
)
FIRST_LAST = "{% for m in messages %}{{ m.content|trim('_') }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("v3", conversation("a", "<think>b"), "f:1 messages[1]: got <think> without </think>"),
        (
            "closed",
            conversation("a", REASONED),
            "f:1 messages[1].content: got reasoning, expected none, for the chat template's "
            "generation prompt ends with </think>",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            conversation("a", "b"),
            "f:1: got a conversation that the chat template refuses (roles must alternate)",
        ),
        (
            "{{ messages[0].content + messages[0].name }}",
            conversation("a", "b"),
            "f:1: got a conversation that the chat template refuses",
        ),
        (
            "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
            conversation("question", "b"),
            "f:1 messages[0].content: got a user message that the chat template leaves out",
        ),
        (CHANGES_TEXT, conversation("A", "b"), "f:1 messages[1].content: got an assistant message"),
        (OTHER_PROMPT, conversation("a", "b"), "f:1 messages[1]: got a chat template whose"),
        (
            FIRST_LAST,
            conversation("a", "_b_"),
            "f:1 messages[1].content: got text that the chat template changes",
        ),
        (None, conversation("a", "b"), "f:1: got a conversation and a tokenizer without chat"),
        (
            "v3",
            conversation("a", "b") | {"tools": [{"name": "look"}]},
            "f:1 tools: got tool definitions, expected none",
        ),
    ],
)
def test_rows_that_the_template_would_falsify_are_refused(
    tokenizers, with_template, template, row, message
):
    tokenizer = tokenizers.get(template) or with_template(template)
    with pytest.raises(ConfigError) as caught:
        marked(tokenizer, row)
    assert str(caught.value).startswith(message)


def test_a_weight_on_a_message_that_the_template_changes_is_refused(with_template):
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.content + m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}[{% endif %}"
    )
    row = {"messages": [{"role": "user", "content": "a", "loss_weight": 1}]}
    with pytest.raises(ConfigError, match=r"f:1 messages\[0\].loss_weight: got a weight for a"):
        marked(tokenizer, row)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 2.0 ** 5000 }}", "OverflowError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 16 }}", "MemoryError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ messages.pop() }}", "SecurityError"),
        ("{{ ''.join(messages) }}", "TypeError"),
        ("{{ '{:d}'.format('a') }}", "ValueError"),
    ],
)
def test_whatever_a_template_throws_names_the_row(with_template, template, said):
    with pytest.raises(ConfigError) as caught:
        marked(with_template(template), conversation("a", "b"))
    text = str(caught.value)
    assert (
        text.startswith("f:1: got a conversation that the chat template refuses (") and said in text
    )
    assert "order of the roles" not in text


def test_a_template_that_is_not_jinja_is_told_as_that(with_template):
    with pytest.raises(ConfigError, match=r"f:1: got a chat template that is not Jinja \(line 1:"):
        marked(with_template("{% for m in %}"), conversation("a", "b"))


def test_the_order_of_roles_is_said_only_where_that_is_the_reason(with_template):
    for reason, said in (("Conversation roles must alternate user/assistant", True), ("no", False)):
        with pytest.raises(ConfigError) as caught:
            marked(with_template("{{ raise_exception('" + reason + "') }}"), conversation("a", "b"))
        assert ("check the order of the roles" in str(caught.value)) == said
