# SPDX-License-Identifier: Apache-2.0
"""What of a conversation is trained, template by template: every expectation is readable text.

Trained parts stand between ⟦ and ⟧. `B` and `E` are BOS and EOS.
"""

import json
import re

import numpy as np
import pytest
from conftest import EOS, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data import decode_sample, encode_chat, turn_ending
from dsjax.data.chat import chat_examples
from dsjax.data.formats import Chat, parse_row
from dsjax.errors import ConfigError

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
    texts = [decode_sample(made, tokenizer) for made in chat_examples(tokenizer, chat, "f:1")]
    return [
        text.replace("<｜begin▁of▁sentence｜>", "B").replace("<｜end▁of▁sentence｜>", "E")
        for text in texts
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("v3", "B<｜User｜>hi<｜Assistant｜>⟦yesE⟧"),
        # The prompt opened <think>, so the model must close it before it answers.
        ("r1", "B<｜User｜>hi<｜Assistant｜><think>\n⟦\n</think>\n\nyesE⟧"),
        ("v31", "B<｜User｜>hi<｜Assistant｜></think>⟦yesE⟧"),
        ("llm", "BUser: hi\n\nAssistant:⟦ yesE⟧"),
        ("coder", "B### Instruction:\nhi\n### Response:⟦\nyes\n<|EOT|>\n⟧"),
        ("chatml", "user\nhi<|im_end|>\nassistant\n⟦yes<|im_end|>\n⟧"),
    ],
)
def test_answer_and_its_end_are_trained(tokenizers, family, expected):
    assert marked(tokenizers[family], conversation("hi", "yes")) == [expected]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("v3", "B<｜User｜>hi<｜Assistant｜>⟦<think>\nwhy\n</think>\n\nyesE⟧"),
        ("r1", "B<｜User｜>hi<｜Assistant｜><think>\n⟦why\n</think>\n\nyesE⟧"),
        ("v31", "B<｜User｜>hi<｜Assistant｜><think>⟦\nwhy\n</think>\n\nyesE⟧"),
        ("llm", "BUser: hi\n\nAssistant:⟦ <think>\nwhy\n</think>\n\nyesE⟧"),
        ("chatml", "user\nhi<|im_end|>\nassistant\n⟦<think>\nwhy\n</think>\n\nyes<|im_end|>\n⟧"),
    ],
)
def test_reasoning_is_kept_though_templates_delete_it(tokenizers, family, expected):
    assert marked(tokenizers[family], conversation("hi", REASONED)) == [expected]


@pytest.mark.parametrize(
    ("content", "target"),
    [
        ("<think>why</think>yes", "why</think>yesE"),
        ("why</think>yes", "why</think>yesE"),
        ("\n<think>\nwhy</think>yes", "why</think>yesE"),
        ("<think>\n\n</think>\n\nyes", "\n</think>\n\nyesE"),
    ],
)
def test_r1_never_opens_reasoning_twice(tokenizers, content, target):
    prompt = "B<｜User｜>hi<｜Assistant｜><think>\n"
    assert marked(tokenizers["r1"], conversation("hi", content)) == [f"{prompt}⟦{target}⟧"]


def test_reasoning_without_its_opening_mark_gets_one_where_the_prompt_has_none(tokenizers):
    text = marked(tokenizers["v3"], conversation("hi", "why\n</think>\n\nyes"))
    assert text == ["B<｜User｜>hi<｜Assistant｜>⟦<think>\nwhy\n</think>\n\nyesE⟧"]


def test_reasoning_in_a_field_of_its_own_is_the_same(tokenizers):
    row = conversation("hi", "yes")
    row["messages"][1]["reasoning_content"] = "why"
    assert marked(tokenizers["r1"], row) == marked(tokenizers["r1"], conversation("hi", REASONED))


def test_all_turns_of_a_stable_template_share_one_sequence(tokenizers):
    row = conversation("a", "b", "c", "d")
    v3 = "B<｜User｜>a<｜Assistant｜>⟦bE⟧<｜User｜>c<｜Assistant｜>⟦dE⟧"
    llm = "BUser: a\n\nAssistant:⟦ bE⟧User: c\n\nAssistant:⟦ dE⟧"
    assert marked(tokenizers["v3"], row) == [v3]
    assert marked(tokenizers["llm"], row) == [llm]


def test_r1_turns_become_sequences_as_inference_shows_them(tokenizers):
    assert marked(tokenizers["r1"], conversation("a", REASONED, "c", REASONED)) == [
        "B<｜User｜>a<｜Assistant｜><think>\n⟦why\n</think>\n\nyesE⟧",
        "B<｜User｜>a<｜Assistant｜>\n\nyesE<｜User｜>c<｜Assistant｜><think>\n⟦why\n</think>\n\nyesE⟧",
    ]


def test_turns_part_where_the_tokens_of_the_history_differ(tokenizers):
    # Alone, the prompt ends in ":"; in the history ":\n" is one token. The second turn sees that.
    texts = marked(tokenizers["coder"], conversation("a", "b", "c", "d"))
    head = "B### Instruction:\na\n### Response:"
    assert texts == [
        f"{head}⟦\nb\n<|EOT|>\n⟧",
        f"{head}\nb\n<|EOT|>\n### Instruction:\nc\n### Response:⟦\nd\n<|EOT|>\n⟧",
    ]


@pytest.mark.parametrize("family", ["v3", "r1", "v31", "llm", "coder", "chatml"])
def test_what_precedes_a_target_is_what_inference_sees(tokenizers, family):
    row = conversation("a", "b", "c", "d")
    chat = parse_row(row, "messages", "f:1")
    last = chat_examples(tokenizers[family], chat, "f:1")[-1]
    shown = encode_chat(tokenizers[family], row["messages"][:3])
    assert last.input_ids[: len(shown)].tolist() == shown
    assert not last.loss_weights[len(shown) - 1] and last.loss_weights[len(shown)]


def test_eos_is_trained_though_it_is_the_padding_token(tokenizers):
    tokenizer = tokenizers["v3"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (made,) = chat_examples(tokenizer, Chat(conversation("a", "b")["messages"], [0, 1]), "f:1")
    assert made.input_ids[-1] == tokenizer.eos_token_id and made.loss_weights[-1] == 1


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("emits", [True, False])
def test_bos_stands_once(with_template, flag, emits):
    template = ("{{ bos_token }}" if emits else "") + "{% for m in messages %}[{{ m.content }}]"
    tokenizer = with_template(template + "{% endfor %}", add_bos_token=flag)
    (text,) = marked(tokenizer, {"messages": [{"role": "user", "content": "a"}]})
    assert text.count("B") == int(flag or emits)
    assert encode_chat(tokenizer, [{"role": "user", "content": "a"}]).count(
        tokenizer.bos_token_id
    ) == int(flag or emits)


def test_a_template_that_closes_no_turn_gets_eos(with_template):
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert marked(tokenizer, conversation("a", "b")) == ["[user]a[assistant]⟦bE⟧"]
    assert marked(tokenizer, conversation("a", "")) == ["[user]a[assistant]⟦E⟧"]


def test_loss_weight_multiplies_and_can_train_other_roles(tokenizers):
    row = conversation("a", "b", "c", "d")
    weights = (0.25, 0.0, 0.0, 0.5)
    for message, weight in zip(row["messages"], weights, strict=True):
        message["loss_weight"] = weight
    chat = parse_row(row, "messages", "f:1")
    (made,) = chat_examples(tokenizers["v3"], chat, "f:1")
    text = decode_sample(made, tokenizers["v3"])
    assert "<｜User｜>⟦a⟧<｜Assistant｜>b" in text and "<｜Assistant｜>⟦d" in text
    assert sorted(set(made.loss_weights.tolist())) == [0, 0.25, 0.5]


def test_a_trained_last_user_message_is_in_the_sequence(tokenizers):
    row = conversation("a", "b", "cc")
    row["messages"][2]["loss_weight"] = 1
    assert marked(tokenizers["v3"], row) == [
        "B<｜User｜>a<｜Assistant｜>⟦bE⟧<｜User｜>⟦cc⟧",
    ]


def test_a_row_with_nothing_to_train_stays_whole(tokenizers):
    assert marked(tokenizers["v3"], conversation("a")) == ["B<｜User｜>a"]


def test_every_message_is_trained_in_one_sequence_only(tokenizers):
    row = conversation("a", REASONED, "c", REASONED)
    row["messages"][0]["loss_weight"] = 1
    texts = marked(tokenizers["r1"], row)
    assert ["⟦a⟧" in text for text in texts] == [True, False]


def test_tool_calls_are_trained_as_the_template_writes_them(with_template):
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{{ tools or '' }}"
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}
    row = {"messages": [{"role": "user", "content": "a"}, call]}
    assert marked(tokenizer, row) == ["[user]aE[assistant]⟦(look)E⟧"]


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


def test_samples_without_tokenizer_show_ids():
    from dsjax.data import Example

    ids = np.arange(5, dtype=np.int32)
    weights = np.array([1, 0, 1, 1, 0], np.float32)
    assert decode_sample(Example(ids, ids, weights), None) == "0 1⟦2 3⟧4"


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
        (made,) = chat_examples(tokenizer, chat, "f:1")
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


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("v3", ["B<｜Assistant｜>⟦hiE⟧<｜User｜>a<｜Assistant｜>⟦bE⟧"]),
        (
            "r1",
            [
                "B<｜Assistant｜><think>\n⟦\n</think>\n\nhiE⟧",
                "B<｜Assistant｜>hiE<｜User｜>a<｜Assistant｜><think>\n⟦\n</think>\n\nbE⟧",
            ],
        ),
        ("llm", ["BAssistant:⟦ hiE⟧User: a\n\nAssistant:⟦ bE⟧"]),
        ("chatml", ["assistant\n⟦hi<|im_end|>\n⟧user\na<|im_end|>\nassistant\n⟦b<|im_end|>\n⟧"]),
        (
            "first",
            ["<system>\nassistant\n⟦hi<|im_end|>\n⟧user\na<|im_end|>\nassistant\n⟦b<|im_end|>\n⟧"],
        ),
    ],
)
def test_conversations_that_the_assistant_begins_are_trained(
    tokenizers, with_template, family, expected
):
    # Some templates look at the first message, which at this point there is none.
    looks = "{% if messages[0]['role'] != 'system' %}<system>\n{% endif %}" + TEMPLATES["chatml"]
    tokenizer = with_template(looks) if family == "first" else tokenizers[family]
    row = conversation("a", "b")
    row["messages"].insert(0, {"role": "assistant", "content": "hi"})
    assert marked(tokenizer, row) == expected


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
