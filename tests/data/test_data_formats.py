# SPDX-License-Identifier: Apache-2.0
"""What rows mean, format by format, and rows that are refused with file, line and field."""

from typing import Any

import pytest

from dsjax.data.formats import Chat, Pretokenized, Text, detect_format, parse_row
from dsjax.errors import ConfigError

KEYS = {
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
    "messages": {"messages"},
}
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("messages", "text"), "messages"),
        (("conversations", "system"), "sharegpt"),
        (("input_ids", "labels", "text"), "tokens"),
        (("prompt", "completion"), "prompt_completion"),
        (("instruction", "input", "output", "text"), "alpaca"),
        (("text", "id"), "text"),
    ],
)
def test_formats_are_told_by_their_keys(keys, name):
    assert detect_format(dict.fromkeys(keys, "x"), "f:1") == name


def test_keys_that_are_null_do_not_count():
    assert detect_format({"messages": None, "text": "x"}, "f:1") == "text"


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        (
            "messages",
            {"messages": [SYSTEM, USER, ASSISTANT]},
            Chat([SYSTEM, USER, ASSISTANT], [0, 0, 1]),
        ),
        (
            "messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "value": "q"}],
                        "loss_weight": 0.5,
                    },
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "a"}, {"text": "b"}],
                        "loss_weight": 2,
                    },
                ]
            },
            Chat([USER, {"role": "assistant", "content": "ab"}], [0.5, 2]),
        ),
        (
            "messages",
            {"messages": [USER | {"loss_weight": None, "name": None}, ASSISTANT]},
            Chat([USER, ASSISTANT], [0, 1]),
        ),
        (
            "sharegpt",
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            },
            Chat([SYSTEM, USER, ASSISTANT], [0, 0, 1]),
        ),
        ("sharegpt", {"conversations": [USER, ASSISTANT]}, Chat([USER, ASSISTANT], [0, 1])),
        (
            "alpaca",
            {"instruction": "q", "input": "", "output": "a", "system": "s"},
            Chat([SYSTEM, USER, ASSISTANT], [0, 0, 1]),
        ),
        (
            "alpaca",
            {"instruction": "q", "input": "i", "output": "a", "history": [["x", "y"]]},
            Chat(
                [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "y"},
                    {"role": "user", "content": "q\ni"},
                    ASSISTANT,
                ],
                [0, 1, 0, 1],
            ),
        ),
        (
            "prompt_completion",
            {"prompt": "p", "completion": "c"},
            Text([("p", 0.0), ("c", 1.0)]),
        ),
        (
            "prompt_completion",
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            Chat([USER, ASSISTANT, USER, ASSISTANT], [0, 0, 0, 1]),
        ),
        ("text", {"text": "t"}, Text([("t", 1.0)])),
    ],
)
def test_rows_are_normalised(name, fields, expected):
    made = parse_row(fields, name, "f:1")
    assert type(made) is type(expected) and made[:3] == expected[:3]


def test_tokens_without_labels_are_their_own():
    made = parse_row({"input_ids": [1, 2, 3]}, "tokens", "f:1")
    assert isinstance(made, Pretokenized)
    assert made.input_ids.tolist() == made.labels.tolist() == [1, 2, 3]


def messages(*turns) -> dict:
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "messages",
            {"text": "x"},
            "f:3: got the keys text, expected also messages for the format",
        ),
        ("messages", {"messages": []}, "f:3 messages: got [], expected a list of messages"),
        ("messages", {"messages": "hi"}, "f:3 messages: got hi, expected a list of messages"),
        ("messages", messages("hi"), "f:3 messages[0]: got hi, expected an object with role"),
        ("messages", messages({"content": "x"}), "f:3 messages[0].role: got None, expected one of"),
        (
            "messages",
            messages({"role": "bot", "content": "x"}),
            "f:3 messages[0].role: got bot, expected one of system, user",
        ),
        ("messages", messages({"role": "user"}), "f:3 messages[0].content: got None, expected a"),
        (
            "messages",
            messages(USER, {"role": "assistant", "content": 7}),
            "f:3 messages[1].content: got 7, expected a string or a list of text parts",
        ),
        (
            "messages",
            messages({"role": "user", "content": [{"type": "image", "url": "x"}]}),
            "f:3 messages[0].content[0]: got image, expected a part of type text",
        ),
        (
            "messages",
            messages({"role": "user", "content": ["x"]}),
            "f:3 messages[0].content[0]: got x, expected a part of type text",
        ),
        (
            "messages",
            messages({"role": "user", "content": [{"type": "text"}]}),
            "f:3 messages[0].content[0].text: got None, expected a string",
        ),
        (
            "messages",
            messages(ASSISTANT | {"loss_weight": -1}),
            "f:3 messages[0].loss_weight: got -1, expected a number of at least 0",
        ),
        (
            "messages",
            messages(ASSISTANT | {"loss_weight": "1"}),
            "f:3 messages[0].loss_weight: got 1, expected a number of at least 0",
        ),
        (
            "messages",
            messages(ASSISTANT | {"loss_weight": float("nan")}),
            "f:3 messages[0].loss_weight: got nan, expected a number of at least 0",
        ),
        (
            "messages",
            messages(ASSISTANT | {"reasoning_content": 1}),
            "f:3 messages[0].reasoning_content: got 1, expected a string",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "f:3 conversations[0].from: got narrator, expected one of",
        ),
        (
            "sharegpt",
            {"conversations": [SYSTEM, USER], "system": "t"},
            "f:3 system: got t, expected one system text, not also a system message",
        ),
        ("alpaca", {"instruction": 1, "output": "x"}, "f:3 instruction: got 1, expected a string"),
        ("alpaca", {"instruction": "x", "output": 1}, "f:3 output: got 1, expected a string"),
        (
            "alpaca",
            {"instruction": "x", "input": 1, "output": "x"},
            "f:3 input: got 1, expected a string",
        ),
        (
            "alpaca",
            {"instruction": "x", "output": "x", "history": [["q"]]},
            "f:3 history[0]: got ['q'], expected a pair [question, answer]",
        ),
        (
            "alpaca",
            {"instruction": "x", "output": "x", "history": [["q", 1]]},
            "f:3 history[0][1]: got 1, expected a string",
        ),
        (
            "prompt_completion",
            {"prompt": "x", "completion": [ASSISTANT]},
            "f:3 completion: got [{'role': 'assistant', 'content': 'a'}], expected a string",
        ),
        ("text", {"text": ["x"]}, "f:3 text: got ['x'], expected a string"),
        ("tokens", {"input_ids": []}, "f:3 input_ids: got [], expected at least one token"),
        (
            "tokens",
            {"input_ids": [1, "2"]},
            "f:3 input_ids[1]: got 2, expected an integer token id",
        ),
        ("tokens", {"input_ids": [1.0]}, "f:3 input_ids[0]: got 1.0, expected an integer token id"),
        ("tokens", {"input_ids": [True]}, "f:3 input_ids[0]: got True, expected an integer token"),
        ("tokens", {"input_ids": [[1]]}, "f:3 input_ids[0]: got [1], expected an integer token id"),
        ("tokens", {"input_ids": 5}, "f:3 input_ids: got 5, expected a list of token ids"),
        ("tokens", {"input_ids": [2**40]}, "f:3 input_ids[0]: got 1099511627776, expected an int"),
        (
            "tokens",
            {"input_ids": [1, 2], "labels": [1]},
            "f:3 labels: got 1 values, expected 2 as in input_ids",
        ),
        (
            "tokens",
            {"input_ids": [1, 2], "attention_mask": [1, 0]},
            "f:3 attention_mask: got zeros, expected rows without padding",
        ),
    ],
)
def test_wrong_rows_name_file_line_and_field(name, fields, message):
    with pytest.raises(ConfigError) as caught:
        parse_row(fields, name, "f:3")
    assert str(caught.value).startswith(message)


def test_unknown_keys_list_the_formats():
    with pytest.raises(ConfigError) as caught:
        detect_format({"question": 1, "answer": 2}, "f:1")
    assert str(caught.value).startswith(
        "f:1: got the keys answer, question, expected those of a known format (messages: messages; "
        "sharegpt: conversations; tokens: input_ids; prompt_completion: prompt + completion; "
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction": "Add", "input": "", "output": None}, "f:1 output: got null, expected a"),
        ({"prompt": None, "completion": "x", "id": 1}, "f:1 prompt: got null, expected a value"),
        (
            {"messages": None, "note": "x"},
            "f:1 messages: got null, expected a value, which the for",
        ),
    ],
)
def test_nulls_where_a_format_needs_a_value_are_named(fields, message):
    with pytest.raises(ConfigError) as caught:
        detect_format(fields, "f:1")
    assert str(caught.value).startswith(message)
    name = next(name for name, keys in KEYS.items() if fields.keys() >= keys)
    with pytest.raises(ConfigError) as caught:
        parse_row(fields, name, "f:1")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "fields",
    [
        {"\x0bmessages": "[]"},
        {"te\nxt": "a"},
        {"messages": [{"role": "user", "content": "a", "na\rme": 1}]},
    ],
    ids=["csv", "row", "message"],
)
def test_a_refusal_is_one_line_whatever_a_key_is(fields: dict[str, Any]):
    with pytest.raises(ConfigError) as error:
        parse_row(fields, detect_format(fields, "f:1"), "f:1")
    assert len(str(error.value).splitlines()) == 1
