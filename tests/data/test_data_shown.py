# SPDX-License-Identifier: Apache-2.0
"""What stands in a message stands in the tokens, or the row is refused: over random rows and
templates that hide one thing or another.

The oracle is a renderer in Python of the same templates, which knows what they hide.
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BOS, EOS, write_tokenizer
from transformers import PreTrainedTokenizerFast

from dsjax.data import decode_sample, load_tokenizer
from dsjax.data.chat import chat_examples
from dsjax.data.formats import parse_row
from dsjax.errors import ConfigError

HIDEABLE = ("system", "user", "assistant", "tool", "names", "arguments", "calls", "repeats", "long")
LONG = 20
# Short texts are found everywhere, "None" and marks are what templates write themselves.
TEXTS = ("a", "ab", ">", "No", "b>a", "<b>", "é", '"q"', "{'x': 1}", "hello", "x y" * 9, "a\nb", "")
NAMES = ("a", "look", "get_time")
ARGUMENTS = ({"a": "b"}, {"a": 1, "ab": [True, None]}, {"q": {"x": '"', "é": "ü"}}, {"flag": False})


def template_that_hides(hidden: frozenset[str], as_json: bool) -> str:
    """Write a template that shows all but `hidden`; `as_json`: it wants arguments as objects."""
    content = f"m.content[:{LONG}]" if "long" in hidden else "m.content"
    roles = [role for role in ("system", "user", "assistant", "tool") if role not in hidden]
    arguments = "c.function.arguments" + ("|tojson" if as_json else "")
    call = ("" if "names" in hidden else "{{ c.function.name }}") + (
        "" if "arguments" in hidden else "{{ ':' + " + arguments + " }}"
    )
    calls = "{% for c in m.tool_calls or [] %}(" + call + "){% endfor %}"
    seen = "m.content not in ns.seen and" if "repeats" in hidden else ""
    return (
        "{% set ns = namespace(seen=[]) %}{% for m in messages %}[{{ m.role }}]"
        f"{{% if {seen} m.content and m.role in {roles} %}}{{{{ {content} }}}}{{% endif %}}"
        f"{'' if 'calls' in hidden else calls}"
        "{% set ns.seen = ns.seen + [m.content] %}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )


def hides_of(messages: list[dict[str, Any]], hidden: frozenset[str]) -> bool:
    """Say whether a template that hides `hidden` hides anything of the messages."""
    seen: list[Any] = []
    for message in messages:
        content = message["content"] or ""
        if content and message["role"] in hidden:
            return True
        if "long" in hidden and len(content) > LONG:
            return True
        if content and "repeats" in hidden and content in seen:
            return True
        if message.get("tool_calls") and hidden & {"calls", "names", "arguments"}:
            return True
        seen.append(message["content"])
    return False


def shown(messages: list[dict[str, Any]]) -> str:
    """Write what such a template shows that hides nothing, trained parts between ⟦ and ⟧."""
    text = ""
    for message in messages:
        calls = ""
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls += f"({call['function']['name']}:{arguments})"
        said = (message["content"] or "") + calls
        answer = message["role"] == "assistant"
        text += f"[{message['role']}]" + (f"⟦{said}{EOS}⟧" if answer else said)
    return text


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw a conversation that ends with the assistant, with calls and their results here and
    there."""
    texts = st.sampled_from(TEXTS)
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()) or not messages:
            messages.append({"role": "user", "content": draw(texts)})
        if draw(st.booleans()):
            calls = draw(st.lists(_calls(), min_size=1, max_size=2))
            content = draw(st.one_of(st.none(), texts))
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            messages += [{"role": "tool", "content": draw(texts)} for _ in calls]
        messages.append({"role": "assistant", "content": draw(texts)})
    return messages


@st.composite
def _calls(draw: st.DrawFn) -> dict[str, Any]:
    arguments = draw(st.sampled_from(ARGUMENTS))
    as_text = json.dumps(arguments, ensure_ascii=False)
    name = draw(st.sampled_from(NAMES))
    given = draw(st.sampled_from((arguments, as_text)))
    return {"type": "function", "function": {"name": name, "arguments": given}}


CASES = (
    conversations(),
    st.frozensets(st.sampled_from(HIDEABLE), max_size=2),
    st.booleans(),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(write_tokenizer(folder, "set by each example"))


def check_shown_or_refused(tokenizer, messages, hidden: frozenset[str], as_json: bool) -> None:
    tokenizer.chat_template = template_that_hides(hidden, as_json)
    chat = parse_row({"messages": messages}, "messages", "f:1")
    if hides_of(messages, hidden):
        with pytest.raises(ConfigError) as caught:
            chat_examples(tokenizer, chat, "f:1")
        assert all(line.startswith("f:1 messages[") for line in str(caught.value).splitlines())
    else:
        ((made, _),) = chat_examples(tokenizer, chat, "f:1")
        assert decode_sample(made, tokenizer).replace(BOS, "") == shown(messages)


@settings(max_examples=60, deadline=None)
@given(*CASES)
def test_what_a_message_says_is_in_the_tokens_or_the_row_is_refused(
    tokenizer, messages, hidden, as_json
):
    check_shown_or_refused(tokenizer, messages, hidden, as_json)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(*CASES)
def test_what_messages_say_is_in_the_tokens_in_many_cases(tokenizer, messages, hidden, as_json):
    check_shown_or_refused(tokenizer, messages, hidden, as_json)
