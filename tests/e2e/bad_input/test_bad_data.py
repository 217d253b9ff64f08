# SPDX-License-Identifier: Apache-2.0
"""Wrong data: sources that are not there, lines that do not parse, rows that mean nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runner import CliRunner, assert_says

GOOD = {"input_ids": [5, 6, 7, 8]}
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


# ---- Sources


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (
            "{folder}/row.jsonl",
            ["data.train[0]: got", "row.jsonl", "a file that exists", "did you mean rows.jsonl?"],
        ),
        ("{folder}/no/rows.jsonl", ["data.train[0]: got", "there is no folder"]),
        ("{folder}", ["data.train[0]: got the folder", "list its files", "rows.jsonl"]),
        ("{folder}/run.yaml", ["data.train[0]: got", "run.yaml", "a file that ends in .json"]),
        (
            "memory://bucket/rows.jsonl",
            ["data.train[0]: got memory://bucket/rows.jsonl, expected a file that exists"],
        ),
        ("gs://bucket/rows", ["data.train[0]: got gs://bucket/rows, expected a file that ends in"]),
        ("someone/no-such-dataset", ["data.train[0]: got someone/no-such-dataset", "hub dataset"]),
    ],
    ids=["typo", "no_folder", "folder", "yaml", "url", "url_of_no_rows", "hub_offline"],
)
def test_a_source_that_cannot_be_read(cli_runner: CliRunner, source: str, parts: list[str]):
    assert_says(cli_runner.refusal(f"data.train={source.format(folder=cli_runner.folder)}"), *parts)


def test_a_pattern_that_matches_nothing(cli_runner: CliRunner):
    message = cli_runner.refusal(f"data.train={cli_runner.folder}/*.json")
    assert_says(message, "data.train[0]: got", "*.json, which matches no file")


def test_a_mapping_of_columns_that_are_not_there(cli_runner: CliRunner):
    message = cli_runner.refusal("data.column_mapping={labels: lable, text: input_id}")
    assert_says(message, "data.column_mapping: got input_id for text, which no row has")
    assert_says(message, "did you mean input_ids?", "data.column_mapping: got lable for labels")
    message = cli_runner.refusal("data.column_mapping={question: instruction}")
    assert_says(
        message, "got question: instruction, expected one of", "write instruction: question"
    )


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.val_size=8", ["data.val_size: got 8, which is 8 of the 8 rows of data.train"]),
        ("data.val_size=1.5", ["data.val_size: got 1.5, expected"]),
        ("data.val_size=0", ["data.val_size: got 0, expected"]),
    ],
)
def test_a_share_that_leaves_nothing(cli_runner: CliRunner, override: str, parts: list[str]):
    assert_says(cli_runner.refusal(override), *parts)


def test_rows_to_evaluate_on_named_twice(cli_runner: CliRunner):
    message = cli_runner.refusal("data.val_size=2", f"data.eval={cli_runner.rows}")
    assert_says(message, "data.val_size: got 2 beside data.eval, expected one of the two")


def test_the_second_of_two_sources(cli_runner: CliRunner):
    message = cli_runner.refusal(f"data.train=[{cli_runner.rows}, {cli_runner.folder}/more.jsonl]")
    assert_says(message, "data.train[1]: got", "more.jsonl", "a file that exists")


def test_an_evaluation_file_that_is_not_there(cli_runner: CliRunner):
    message = cli_runner.refusal(f"data.eval={cli_runner.folder}/held_out.jsonl")
    assert_says(message, "data.eval[0]: got", "held_out.jsonl", "a file that exists")


@pytest.mark.parametrize("text", ["", "\n\n"], ids=["empty", "blank"])
def test_a_file_without_rows(cli_runner: CliRunner, text: str):
    cli_runner.rows.write_text(text)
    assert_says(
        cli_runner.refusal(), "data.train[0]: got", "without a row", "expected at least one"
    )


# ---- Lines


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            '{"input_ids": [1, 2}',
            ["rows.jsonl:3: got a line that is not JSON", "one object per line"],
        ),
        ("[1, 2, 3]", ["rows.jsonl:3: got a list", "expected an object"]),
        ('"text"', ["rows.jsonl:3: got a str", "expected an object"]),
    ],
    ids=["json", "list", "text"],
)
def test_a_line_that_is_no_row(cli_runner: CliRunner, line: str, parts: list[str]):
    cli_runner.write_rows(GOOD, GOOD, line, GOOD)
    assert_says(cli_runner.refusal(), *parts)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("rows.json", b'[{"text": "a"}, {"text" "b"}]', ["rows.json:1: got", "expected JSON"]),
        ("rows.json", b'{"rows": []}', ["rows.json", "expected"]),
        ("rows.json", b"12", ["rows.json:1: got '12'", "an array of rows"]),
        (
            "rows.csv",
            b"prompt,completion\na,b\na,b,c\n",
            ["rows.csv:3: got 3 columns", "expected 2"],
        ),
        ("rows.csv", b'prompt,completion\na,"b\n', ["rows.csv:2: got a row that is not CSV"]),
        (
            "rows.csv",
            b'input_ids\n"1 2 3"\n',
            ["rows.csv:2 input_ids: got '1 2 3'", "expected JSON"],
        ),
        ("rows.parquet", b"PAR1 not really", ["rows.parquet: got", "expected a Parquet file"]),
        ("rows.txt", b"caf\xe9\n", ["rows.txt:1: got bytes that are not UTF-8", "convert it"]),
        ("rows.jsonl", b'{"text": "caf\xe9"}\n', ["rows.jsonl:1: got a line that is not JSON"]),
        (
            "rows.jsonl",
            b'{"text": "a"}\n{"text": "b \\udc97"}\n',
            ["rows.jsonl:2 text: got the lone surrogate '\\udc97' as character 3", "remove it"],
        ),
        (
            "rows.jsonl",
            b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
            ["rows.jsonl:1: got values nested too deep"],
        ),
        (
            "rows.json",
            b'[{"input_ids": [1,\n' + b"9" * 5000 + b"]}]",
            ["rows.json:1: got an integer of too many digits", "4300"],
        ),
        (
            "rows.jsonl",
            b'{"input_ids": [5, ' + b"9" * 400 + b"]}",
            ["rows.jsonl:1 input_ids[1]: got 9999", "an integer token id"],
        ),
        (
            "rows.parquet",
            b"PAR1" + b"\xff" * 40 + b"\x10\x00\x00\x00PAR1",
            ["rows.parquet: got OSError", "a Parquet file that can be read"],
        ),
        ("rows.jsonl.gz", b"\x1f\x8b", ["rows.jsonl.gz", "a file that ends in", "unpack it"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_file_of_another_kind_than_its_name(
    cli_runner: CliRunner, name: str, content: bytes, parts: list[str]
):
    (cli_runner.folder / name).write_bytes(content)
    assert_says(cli_runner.refusal(f"data.train={cli_runner.folder / name}"), *parts)


# ---- Rows


@pytest.mark.parametrize(
    ("row", "form", "parts"),
    [
        (
            {"question": "a", "answer": "b"},
            "auto",
            ["got the keys answer, question", "messages: messages", "rename the keys"],
        ),
        (
            {"text": "a"},
            "messages",
            ["got the keys text", "expected also messages for the format messages"],
        ),
        (
            {"instruction": "Add", "input": "", "output": None},
            "auto",
            ["rows.jsonl:1 output: got null, expected a value", "the format alpaca"],
        ),
        (
            {"prompt": None, "completion": "a"},
            "prompt_completion",
            ["rows.jsonl:1 prompt: got null"],
        ),
        ({"instruction": "a"}, "alpaca", ["expected also output for the format alpaca"]),
        ({"prompt": "a", "completion": 3}, "auto", ["completion: got 3", "expected a string"]),
        ({"prompt": CHAT, "completion": "b"}, "auto", ["prompt: got", "expected a string"]),
        ({"text": ["a"]}, "auto", ["text: got ['a']", "expected a string"]),
        ({"messages": []}, "auto", ["messages: got []", "expected a list of messages"]),
        ({"messages": "hello"}, "auto", ["messages: got hello", "expected a list of messages"]),
        (
            {"messages": ["hello"]},
            "auto",
            ["messages[0]: got hello", "an object with role and content"],
        ),
        (
            {"messages": [{"role": "wizard", "content": "a"}]},
            "auto",
            ["messages[0].role: got wizard", "one of system, user, human, assistant"],
        ),
        ({"messages": [{"content": "a"}]}, "auto", ["messages[0].role: got None", "one of system"]),
        (
            {"messages": [{"role": "user"}]},
            "auto",
            ["messages[0].content: got None", "a string or a list"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
                    CHAT[1],
                ]
            },
            "auto",
            ["messages[0].content[0]: got image_url", "a part of type text"],
        ),
        (
            {"messages": [*CHAT[:1], CHAT[1] | {"loss_weight": -1}]},
            "auto",
            ["messages[1].loss_weight: got -1", "at least 0"],
        ),
        (
            {"messages": [*CHAT[:1], CHAT[1] | {"loss_weight": "high"}]},
            "auto",
            ["messages[1].loss_weight: got high"],
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": "<think>hm"}]},
            "auto",
            ["messages[1]: got <think> without </think>"],
        ),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            "auto",
            ["conversations[0].value: got 3"],
        ),
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            "sharegpt",
            ["conversations[0].from: got alien"],
        ),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            "auto",
            ["history[0]: got c", "a pair [question, answer]"],
        ),
        ({"input_ids": []}, "auto", ["input_ids: got []", "at least one token"]),
        ({"input_ids": "5 6 7"}, "auto", ["input_ids: got 5 6 7", "a list of token ids"]),
        ({"input_ids": [5, 6.5]}, "auto", ["input_ids[1]: got 6.5", "an integer token id"]),
        (
            {"input_ids": [5, 288]},
            "auto",
            ["input_ids[1]: got 288", "a token id from 0 to 287", "another model"],
        ),
        ({"input_ids": [5, -1]}, "auto", ["input_ids[1]: got -1", "a token id from 0 to 287"]),
        (
            {"input_ids": [5, 6], "labels": [6]},
            "auto",
            ["labels: got 1 values", "expected 2 as in input_ids"],
        ),
        (
            {"input_ids": [5, 6], "labels": [5, 999]},
            "auto",
            ["labels[1]: got 999", "a token id from 0 to 287"],
        ),
        (
            {"input_ids": [5, 6], "attention_mask": [1, 0]},
            "auto",
            ["attention_mask: got zeros", "without padding"],
        ),
        (
            {"input_ids": [5, 6], "attention_mask": "11"},
            "auto",
            ["attention_mask: got 11", "a list"],
        ),
    ],
)
def test_a_row_that_means_nothing(cli_runner: CliRunner, row: Any, form: str, parts: list[str]):
    cli_runner.write_rows(row)
    assert_says(cli_runner.refusal(f"data.format={form}"), "rows.jsonl:1", *parts)


def test_a_row_of_another_format_than_the_one_named(cli_runner: CliRunner):
    cli_runner.write_rows(GOOD, GOOD, {"text": "a"})
    message = cli_runner.refusal("data.format=tokens")
    assert_says(message, "rows.jsonl:3: got the keys text", "expected also input_ids", "tokens")


def test_several_wrong_rows_are_named_at_once(cli_runner: CliRunner):
    cli_runner.write_rows(GOOD, {"input_ids": []}, GOOD, {"input_ids": [999]})
    assert_says(
        cli_runner.refusal(), "rows.jsonl:2 input_ids: got []", "rows.jsonl:4 input_ids[0]: got 999"
    )


def test_a_conversation_without_a_chat_template(cli_runner: CliRunner):
    file = cli_runner.model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["chat_template"]
    file.write_text(json.dumps(settings))
    (cli_runner.model / "chat_template.jinja").unlink(missing_ok=True)
    cli_runner.write_rows({"messages": CHAT})
    assert_says(
        cli_runner.refusal(),
        "rows.jsonl:1: got a conversation",
        "without chat template",
        "chat_template.jinja",
    )


def test_a_chat_template_that_is_no_template(cli_runner: CliRunner):
    file = cli_runner.model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{% if %}"}))
    cli_runner.write_rows({"messages": CHAT})
    assert_says(cli_runner.refusal(), "rows.jsonl:1: got a chat template that is not Jinja")


def test_tools_that_the_template_does_not_show(cli_runner: CliRunner):
    cli_runner.write_rows({"messages": CHAT, "tools": [{"name": "search"}]})
    assert_says(cli_runner.refusal(), "rows.jsonl:1 tools: got tool definitions", "expected none")


# ---- Length and weight


def test_overlong_rows_that_are_an_error(cli_runner: CliRunner):
    cli_runner.write_rows(GOOD, {"input_ids": [5] * 65}, {"input_ids": [5] * 70})
    message = cli_runner.refusal("data.overlong=error")
    assert_says(message, "data.overlong: got 2 rows longer than data.max_length = 64")
    assert_says(
        message, "rows.jsonl:2: 65 tokens", "rows.jsonl:3: 70 tokens", "raise data.max_length"
    )


def test_overlong_rows_of_which_none_is_left(cli_runner: CliRunner):
    cli_runner.write_rows({"input_ids": [5] * 65})
    message = cli_runner.refusal("data.overlong=drop")
    assert_says(message, "data.train: got 1 rows, all longer than data.max_length = 64 and dropped")


def test_rows_without_a_trained_token(cli_runner: CliRunner):
    cli_runner.write_rows({"input_ids": [5, 6, 7], "labels": [-100, -100, -100]})
    message = cli_runner.refusal()
    assert_says(message, "data.train: got 1 sequences without one trained token", "labels")


def test_one_token_per_row(cli_runner: CliRunner):
    cli_runner.write_rows({"input_ids": [5]})
    assert_says(cli_runner.refusal(), "data.train: got 1 sequences without one trained token")


def test_a_file_of_another_user(cli_runner: CliRunner, monkeypatch: pytest.MonkeyPatch):
    opened = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any):
        if path == cli_runner.rows:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert_says(
        cli_runner.refusal(),
        "rows.jsonl: got Permission denied",
        "expected a file that can be read",
    )
