# SPDX-License-Identifier: Apache-2.0
"""One message: the names that data sets give its parts, its weight, its calls, and refusals."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.formats import Chat, parse_row, unread_keys
from dsjax.data.messages import read_message, read_tools
from dsjax.errors import ConfigError, printable

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
CALL = {"name": "look", "arguments": {"at": "x"}}
WRAPPED = {"type": "function", "function": CALL}
KNOWN = (
    *("role", "from", "content", "value", "loss_weight", "weight", "train", "loss"),
    *("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call"),
    *("tool_call_id", "name"),
)
EMPTY = (None, "", [], {})


def read(turn: Any) -> tuple[dict[str, Any], float | None]:
    return read_message(turn, "f:1 messages[0]")


@pytest.mark.parametrize(
    ("given_keys", "weight"),
    [
        ({"loss_weight": 0.5}, 0.5),
        ({"weight": 0}, 0.0),
        ({"weight": 2}, 2.0),
        ({"train": False}, 0.0),
        ({"train": 1}, 1.0),
        ({"loss": True}, 1.0),
        ({"loss": 0, "weight": 0.0}, 0.0),
        ({"loss_weight": None, "train": ""}, None),
    ],
)
def test_a_weight_has_several_names(given_keys, weight):
    assert read(ASSISTANT | given_keys) == (ASSISTANT, weight)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(key):
    message, _ = read(ASSISTANT | {key: "why"})
    assert message["content"] == "<think>\nwhy\n</think>\n\na"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [WRAPPED]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([WRAPPED])},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps([CALL])},
    ],
)
def test_calls_have_several_forms(turn):
    assert read(turn)[0] == {"role": "assistant", "content": None, "tool_calls": [WRAPPED]}


def test_a_call_keeps_its_id_and_its_arguments_as_they_are_given():
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}
    message, _ = read({"role": "assistant", "content": "", "tool_calls": [call]})
    assert message["tool_calls"] == [call] and message["content"] == ""
    result = {"role": "tool", "content": "r", "tool_call_id": "7", "name": "f"}
    assert read(result)[0] == result
    bare = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert read(bare)[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize("empty", [None, "", "  ", "{}", " { } ", {}])
def test_a_call_without_arguments_has_an_empty_object(empty):
    call = {"name": "f", "arguments": empty}
    message, _ = read({"role": "assistant", "content": "", "tool_calls": [call]})
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize("text", ["null", "[]", "1", '"a"'])
def test_arguments_that_are_json_and_no_object_are_refused(text):
    call = {"name": "f", "arguments": text}
    with pytest.raises(ConfigError, match=r"arguments: got .*, expected an object"):
        read({"role": "assistant", "content": "", "tool_calls": [call]})


def test_a_prompt_of_no_messages_is_as_none():
    answer = [{"role": "assistant", "content": "x"}]
    chat = parse_row({"prompt": [], "completion": answer}, "prompt_completion", "f:1")
    assert isinstance(chat, Chat) and chat.messages == answer and chat.weights == [1.0]


def test_tools_may_be_json_text():
    tools = [{"name": "look"}]
    assert read_tools(json.dumps(tools), "f:1 tools") == read_tools(tools, "f:1 tools") == tools
    assert [read_tools(empty, "f:1 tools") for empty in (*EMPTY, "[]", " ")] == [None] * 6


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (ASSISTANT | {"mask": True}, ".mask: got a key that is none of a message's"),
        (ASSISTANT | {"loss_wieght": 0}, ".loss_wieght: got a key that is none of a message's"),
        (ASSISTANT | {"train": 0.5}, ".train: got 0.5, expected 0, 1, false or true"),
        (ASSISTANT | {"loss": "no"}, ".loss: got no, expected 0, 1, false or true"),
        (ASSISTANT | {"weight": 1e39}, ".weight: got 1e+39, expected a number of at least 0, with"),
        (
            ASSISTANT | {"weight": 1e-60},
            ".weight: got 1e-60, expected a number of at least 0, with",
        ),
        (ASSISTANT | {"weight": 10**400}, ".weight: got 1000"),
        (ASSISTANT | {"weight": 0, "train": True}, ".train: got True, expected none beside weight"),
        (ASSISTANT | {"value": "b"}, ".value: got b, expected none beside content; keep one"),
        (USER | {"reasoning": "why"}, ".reasoning: got why, expected none beside the role user"),
        (
            {"role": "assistant", "content": "<think>b</think>a", "thinking": "b"},
            ".content: got </think> beside reasoning in a key of its own",
        ),
        (ASSISTANT | {"reasoning": "b</think>"}, ".reasoning: got </think> beside reasoning in"),
        (ASSISTANT | {"tool_calls": "look"}, ".tool_calls: got look, expected JSON ("),
        (ASSISTANT | {"tool_calls": [7]}, ".tool_calls[0]: got 7, expected a call such as"),
        (
            ASSISTANT | {"tool_calls": [{"name": ""}]},
            ".tool_calls[0].name: got , expected",
        ),
        (
            ASSISTANT | {"tool_calls": [{"name": "f", "parameters": {"a": 1}}]},
            ".tool_calls[0].parameters: got a key that is none of a call's",
        ),
        (
            ASSISTANT | {"function_call": {"name": "f", "arguments": [1]}},
            ".function_call[0].arguments: got [1], expected an object",
        ),
        (
            ASSISTANT | {"tool_calls": [CALL], "function_call": CALL},
            ".function_call: got a call, expected none beside tool_calls",
        ),
        ({"from": "function_call", "value": "look"}, ".value: got look, expected JSON ("),
        ({"from": "function_call", "value": ""}, ".value[0]: got None, expected a call such as"),
    ],
)
def test_what_cannot_be_read_in_one_way_is_refused(turn, message):
    with pytest.raises(ConfigError) as caught:
        read(turn)
    assert str(caught.value).startswith(f"f:1 messages[0]{message}")


def test_an_unknown_key_is_told_with_the_nearest_known_and_mask_with_what_to_write():
    with pytest.raises(ConfigError, match="did you mean loss_weight"):
        read(ASSISTANT | {"loss_wieght": 0})
    with pytest.raises(ConfigError, match="write loss_weight 1 or 0"):
        read(ASSISTANT | {"mask": 0})


VALUES = st.one_of(
    st.sampled_from(EMPTY), st.text(max_size=3), st.integers(), st.lists(st.integers(), max_size=2)
)
EXTRAS = st.dictionaries(st.text(max_size=12).filter(lambda key: key not in KNOWN), VALUES)


def check_extra_keys(extra: dict[str, Any]) -> None:
    said = {key: value for key, value in extra.items() if value not in EMPTY}
    if said:
        with pytest.raises(ConfigError) as caught:
            read(ASSISTANT | extra)
        starts = tuple(f"f:1 messages[0].{printable(key)}: got" for key in said)
        assert str(caught.value).startswith(starts)
    else:
        assert read(ASSISTANT | extra) == (ASSISTANT, None)


@settings(max_examples=50, deadline=None)
@given(EXTRAS)
def test_keys_that_nobody_reads_are_refused_unless_they_are_empty(extra):
    check_extra_keys(extra)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(EXTRAS)
def test_keys_that_nobody_reads_are_refused_in_many_cases(extra):
    check_extra_keys(extra)


OPTIONAL = {
    "messages": (ASSISTANT, ("tool_calls", "function_call", "reasoning", "name", "weight")),
    "row": ({"messages": [USER, ASSISTANT]}, ("system", "tools", "images", "chosen", "label")),
    "alpaca": ({"instruction": "q", "output": "a"}, ("input", "history", "system", "tools")),
}
EMPTIES = st.fixed_dictionaries(
    {
        name: st.dictionaries(st.sampled_from(keys), st.sampled_from(EMPTY))
        for name, (_, keys) in OPTIONAL.items()
    }
)


def check_empties(empties: dict[str, dict[str, Any]]) -> None:
    assert read(ASSISTANT | empties["messages"]) == (ASSISTANT, None)
    for name, form in (("row", "messages"), ("alpaca", "alpaca")):
        row = OPTIONAL[name][0]
        plain = parse_row(row, form, "f:1")
        assert parse_row(row | empties[name], form, "f:1") == plain
        assert unread_keys(row | empties[name], form) == []


@settings(max_examples=50, deadline=None)
@given(EMPTIES)
def test_empty_keys_are_as_absent_ones(empties):
    check_empties(empties)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(EMPTIES)
def test_empty_keys_are_as_absent_ones_in_many_cases(empties):
    check_empties(empties)


@pytest.mark.parametrize(
    ("instruction", "extra", "asked"),
    [("q", "i", "q\ni"), ("", "i", "i"), ("q", "", "q"), ("q", None, "q")],
)
def test_an_empty_instruction_leaves_no_line_break(instruction, extra, asked):
    row = {"instruction": instruction, "input": extra, "output": "a"}
    chat = parse_row(row, "alpaca", "f:1")
    assert isinstance(chat, Chat) and chat.messages[0]["content"] == asked


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("chosen", "a", "preferences cannot be trained on yet"),
        ("rejected", [ASSISTANT], "preferences cannot be trained on yet"),
        ("functions", [{"name": "f"}], "tool definitions are read from `tools`"),
        ("label", 0, "classes and judgements cannot be trained on yet"),
        ("kto_tag", True, "preferences cannot be trained on yet"),
        ("images", ["x.png"], "only text can be trained on"),
        ("video", "x.mp4", "only text can be trained on"),
        ("weight", 0.5, "one weight for a whole row is not"),
        ("completion_mask", [0, 1], "masks are not read; give `labels`"),
    ],
)
@pytest.mark.parametrize("form", ["messages", "prompt_completion", "text", "tokens"])
def test_keys_that_change_what_a_row_means_are_refused_by_name(form, key, value, fix):
    rows = {
        "messages": {"messages": [USER, ASSISTANT]},
        "prompt_completion": {"prompt": "p", "completion": "c"},
        "text": {"text": "t"},
        "tokens": {"input_ids": [1, 2]},
    }
    with pytest.raises(ConfigError) as caught:
        parse_row(rows[form] | {key: value}, form, "f:1")
    assert str(caught.value).startswith(f"f:1 {key}: got {key}, expected a row without it; {fix}")


@pytest.mark.parametrize("key", ["system", "tools"])
@pytest.mark.parametrize("row", [{"text": "t"}, {"prompt": "p", "completion": "c"}])
def test_plain_text_has_no_place_for_a_system_text_or_tools(key, row):
    form = "text" if "text" in row else "prompt_completion"
    with pytest.raises(ConfigError, match=f"f:1 {key}: got be brief, expected none beside plain"):
        parse_row(row | {key: "be brief"}, form, "f:1")


def test_a_system_text_goes_first_and_may_stand_twice():
    chat = parse_row({"messages": [USER, ASSISTANT], "system": "s"}, "messages", "f:1")
    assert isinstance(chat, Chat)
    assert chat.messages[0] == {"role": "system", "content": "s"}
    assert [chat.name(index) for index in range(3)] == ["system", "messages[0]", "messages[1]"]
    twice = {"messages": chat.messages, "system": "s"}
    assert parse_row(twice, "messages", "f:1")[:2] == chat[:2]


def test_metadata_is_not_read_and_listed():
    row = {"messages": [USER, ASSISTANT], "id": 7, "source": "x", "note": None}
    assert unread_keys(row, "messages") == ["id", "source"]
