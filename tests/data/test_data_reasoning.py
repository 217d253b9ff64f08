# SPDX-License-Identifier: Apache-2.0
"""Answers without reasoning on templates that ask for it: counted as they are trained."""

import pytest
from conversations import REASONED, conversation

OPENED = "the chat template opens <think>"
CLOSED = "the chat template puts </think> before them; they train its form that does not think"


def told(report) -> list[tuple[str, str]]:
    """The counts that a report tells, and how each explanation begins."""
    counts = (line.partition(" answers are without reasoning: ") for line in report.lines())
    return [
        (count.removeprefix("data.train: "), text.partition(",")[0])
        for count, found, text in counts
        if found
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("r1", [("3 of 4", OPENED)]),
        # An empty reasoning of the row's own opens it, and closes it at once.
        ("v31", [("1 of 4", OPENED), ("2 of 4", CLOSED)]),
        # V3's cuts reasoning off as well, and asks for none.
        *[(family, []) for family in ("v3", "llm", "coder", "chatml", "v3_tools")],
    ],
)
def test_answers_without_reasoning_are_counted_where_it_is_asked_for(
    load_rows, tokenizers, family, expected
):
    empty = conversation("hi", "<think>\n\n</think>\n\nyes")
    rows = [
        conversation("hi", "yes"),
        conversation("hi", "no"),
        conversation("hi", REASONED),
        empty,
    ]
    assert told(load_rows(rows, tokenizers[family]).report) == expected


def test_a_template_that_never_opens_reasoning_has_none(load_rows, tokenizers):
    assert told(load_rows([conversation("hi", "yes")], tokenizers["closed"]).report) == []


def test_where_all_answers_reason_nothing_is_told(load_rows, tokenizers):
    for family in ("r1", "v31"):
        assert told(load_rows([conversation("hi", REASONED)], tokenizers[family]).report) == []


def test_each_trained_answer_of_a_conversation_counts_once(load_rows, tokenizers):
    row = conversation("a", "b", "c", "d", "e", REASONED, "f", "g")
    row["messages"][1]["loss_weight"] = 0
    assert told(load_rows([row], tokenizers["r1"]).report) == [("2 of 3", OPENED)]
    assert told(load_rows([row], tokenizers["v31"]).report) == [("2 of 3", CLOSED)]


def test_an_answer_to_a_tool_is_asked_for_no_reasoning(load_rows, tokenizers):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = conversation("a", "", "", "yes")
    row["messages"][1] |= {"content": None, "tool_calls": [call]}
    row["messages"][2] = {"role": "tool", "content": "3"}
    assert told(load_rows([row], tokenizers["r1_tools"]).report) == [("1 of 1", OPENED)]


def test_only_answers_that_are_trained_count(load_rows, tokenizers):
    rows = [conversation("hi", "yes"), conversation("h" * 80, "yes")]
    for overlong in ("truncate", "drop"):
        found = load_rows(rows, tokenizers["r1"], max_length=40, overlong=overlong).report
        assert told(found) == [("1 of 1", OPENED)]
