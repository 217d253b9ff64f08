# SPDX-License-Identifier: Apache-2.0
"""Tool calls and results, template by template: trained as the template writes them, or refused."""

import json

import pytest
from conversations import marked

from dsjax.errors import ConfigError


def test_tool_calls_are_trained_as_the_template_writes_them(with_template):
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{{ tools or '' }}"
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}
    row = {"messages": [{"role": "user", "content": "a"}, call]}
    assert marked(tokenizer, row) == ["[user]aE[assistant]⟦(look)E⟧"]


CALL = {"name": "look", "arguments": {"at": "Ulm"}}
TOOL_ROW = [
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "here"},
    {"role": "assistant", "content": "There."},
]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "v3_tools",
            [
                'B<｜User｜>where?<｜Assistant｜>⟦<calls>look:{"at": "Ulm"}</calls>E⟧'
                "<out>here</out>⟦There.E⟧"
            ],
        ),
        (
            "r1_tools",
            [
                "B<｜User｜>where?<｜Assistant｜><think>\n"
                '⟦\n</think>\n\n<calls>look:{"at": "Ulm"}</calls>E⟧',
                'B<｜User｜>where?<｜Assistant｜><calls>look:{"at": "Ulm"}</calls>E'
                "<out>here</out>⟦There.E⟧",
            ],
        ),
        (
            "qwen",
            [
                'user\nwhere?<|im_end|>\nassistant\n⟦<call>{"name": "look", "arguments": '
                '{"at": "Ulm"}}</call><|im_end|>\n⟧user\n<out>here</out><|im_end|>\nassistant\n'
                "⟦There.<|im_end|>\n⟧"
            ],
        ),
    ],
)
@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("empty", [None, ""])
def test_calls_and_results_are_shown_as_the_template_writes_them(
    tokenizers, family, expected, as_text, empty
):
    arguments = json.dumps(CALL["arguments"]) if as_text else CALL["arguments"]
    calls = [CALL | {"arguments": arguments}]
    spoken = {"role": "assistant", "content": empty, "tool_calls": calls}
    row = {"messages": [TOOL_ROW[0], spoken, *TOOL_ROW[2:]]}
    assert marked(tokenizers[family], row) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("v3_tools", "⟦<think>\nw\n</think>\n\nLook:<calls>look:{}</calls>E⟧"),
        ("r1_tools", "<think>\n⟦w\n</think>\n\nLook:<calls>look:{}</calls>E⟧"),
    ],
)
def test_reasoning_text_and_calls_are_all_trained(tokenizers, family, expected):
    call = {"name": "look", "arguments": {}}
    spoken = {"role": "assistant", "content": "Look:", "reasoning": "w", "tool_calls": [call]}
    (text,) = marked(tokenizers[family], {"messages": [TOOL_ROW[0], spoken]})
    assert text == f"B<｜User｜>where?<｜Assistant｜>{expected}"
    del spoken["content"]
    (text,) = marked(tokenizers[family], {"messages": [TOOL_ROW[0], spoken | {"content": ""}]})
    assert text == f"B<｜User｜>where?<｜Assistant｜>{expected.replace('Look:', '')}"


def test_null_content_reaches_a_branch_for_it_and_is_never_written_as_none(with_template):
    shape = (
        "{% for m in messages %}[{{ m.role }}]{% if m.content is none %}nothing{% else %}"
        "{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}({{ c.function.name }}"
        "{{ c.function.arguments|tojson }}){% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = {"messages": TOOL_ROW[:2]}
    branch, none = shape, shape.replace("m.content is none", "false")
    written = '(look{"at": "Ulm"})E⟧'
    (text,) = marked(with_template(branch), row)
    assert text == f"[user]where?E[assistant]⟦nothing{written}"
    (text,) = marked(with_template(none), row)
    assert text == f"[user]where?E[assistant]⟦{written}"


def test_arguments_are_never_written_as_python_writes_them(with_template):
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.name }}{{ c.function.arguments }})"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (text,) = marked(tokenizer, {"messages": TOOL_ROW[:2]})
    assert text == '[user]where?[assistant]⟦(look{"at": "Ulm"})E⟧'


@pytest.mark.parametrize("family", ["v3", "r1", "v31", "llm", "coder", "chatml"])
def test_calls_without_a_branch_are_refused_by_name_and_with_the_reason(tokenizers, family):
    with pytest.raises(ConfigError) as caught:
        marked(tokenizers[family], {"messages": TOOL_ROW[:2]})
    assert str(caught.value).startswith(
        "f:1 messages[1].tool_calls[0].function.name: got a call that the chat template has no "
        "branch for"
    )


def test_results_that_are_left_out_or_ascribed_to_the_assistant_are_refused(tokenizers):
    row = {"messages": [TOOL_ROW[0], {"role": "tool", "content": "here"}, TOOL_ROW[3]]}
    with pytest.raises(ConfigError, match=r"f:1 messages\[1\].content: got a tool message that"):
        marked(tokenizers["v3"], row)
    with pytest.raises(ConfigError, match=r"f:1 messages\[1\]: got a tool message, which the chat"):
        marked(tokenizers["llm"], row)


def test_a_turn_that_the_template_ends_between_its_calls_is_refused(with_template):
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.name }}{{ c.function.arguments|tojson }})"
        "{{ eos_token }}{% endfor %}{% if not m.tool_calls %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (text,) = marked(tokenizer, {"messages": TOOL_ROW[:2]})
    assert text.count("E") == 2  # the user's and this one
    twice = TOOL_ROW[1] | {"tool_calls": [CALL, CALL]}
    with pytest.raises(ConfigError, match=r"f:1 messages\[1\]: got a message that the chat templ"):
        marked(tokenizer, {"messages": [TOOL_ROW[0], twice]})


def test_a_name_that_is_not_shown_is_refused_except_beside_a_result(tokenizers):
    row = {"messages": [TOOL_ROW[0] | {"name": "Ann"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(ConfigError, match=r"f:1 messages\[0\].name: got a name that"):
        marked(tokenizers["v3"], row)
