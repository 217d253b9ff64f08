# SPDX-License-Identifier: Apache-2.0
"""Rows and their origins from every kind of file, and what is refused."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.config.inputs import DATA_SUFFIXES
from dsjax.data import json_reader
from dsjax.data.columns import Columns
from dsjax.data.files import READERS, read_rows
from dsjax.errors import ConfigError

FIELD = "data.train[0]"
DEEP_LIST = "[" * 100_000 + "]" * 100_000
DEEP = f'{{"x": {DEEP_LIST}}}'
HUGE = "9" * 5000
PANDAS = [("a.csv:2", {"x": "hi", "y": ""}), ("a.csv:3", {"x": 'say "x"', "y": "b"})]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path) -> list[tuple[str, dict]]:
    """Rows, their origin without the folder."""
    return [
        (origin.removeprefix(f"{path.parent}/"), fields)
        for origin, fields in read_rows(str(path), FIELD, ("train",))
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"x": 1}\n\n{"x": 2}', [("a.jsonl:1", {"x": 1}), ("a.jsonl:3", {"x": 2})]),
        ("a.jsonl", b'\xef\xbb\xbf{"x": 1}\n', [("a.jsonl:1", {"x": 1})]),
        ("a.json", '[{"x": 1},\n {"x":\n  2}]', [("a.json:1", {"x": 1}), ("a.json:2", {"x": 2})]),
        ("a.json", '{"version": [1],\n "data": [\n{"x": 1}]}', [("a.json:3", {"x": 1})]),
        ("a.json", '{"data": [{"x": 1}]}', [("a.json:1", {"x": 1})]),
        ("a.json", '{"x": 1}\n{"x": 2}\n', [("a.json:1", {"x": 1}), ("a.json:2", {"x": 2})]),
        (
            "a.json",
            '{"data": "a"}\n{"data": ""}',
            [("a.json:1", {"data": "a"}), ("a.json:2", {"data": ""})],
        ),
        (
            "a.txt",
            "one\n\n two \r\n",
            [("a.txt:1", {"text": "one"}), ("a.txt:3", {"text": " two "})],
        ),
        (
            "a.csv",
            'prompt,completion\n"a\nb",c\nd,""\n',
            [
                ("a.csv:2", {"prompt": "a\nb", "completion": "c"}),
                ("a.csv:4", {"prompt": "d", "completion": ""}),
            ],
        ),
        ("a.csv", ',x,y\n0,hi,\n1,"say ""x""",b\n', PANDAS),
        ("a.csv", ',,x,y\na,0,hi,\na,1,"say ""x""",b\n', PANDAS),
        ("a.csv", 'x,y,\nhi,,\n"say ""x""",b\n', PANDAS),
        ("a.csv", 'x,y,,\nhi,,,\n"say ""x""",b,\n', PANDAS),
        (
            "a.csv",
            'input_ids,labels\n"[1, 2]",\n',
            [("a.csv:2", {"input_ids": [1, 2], "labels": None})],
        ),
    ],
)
def test_rows_and_their_lines(tmp_path, name, content, expected):
    assert rows_of(write(tmp_path, name, content)) == expected


def test_parquet_counts_rows(tmp_path):
    table = pyarrow.table({"input_ids": [[1, 2], [3]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [
        ("a.parquet:1", {"input_ids": [1, 2]}),
        ("a.parquet:2", {"input_ids": [3]}),
    ]


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text()), max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_json_read_in_pieces_is_the_same(tmp_path_factory, rows, indent, ascii_only, chunk):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path = write(tmp_path_factory.getbasetemp(), "pieces.json", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "CHUNK", chunk)
        assert [fields for _, fields in rows_of(path)] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"x": 1}\n{"x": \n', "a.jsonl:2: got a line that is not JSON"),
        ("a.jsonl", b'{"x": "\xff"}\n', "a.jsonl:1: got a line that is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: got a list, expected an object with the fields of one"),
        ("a.json", '[{"x": 1},\n{"x" 2}]', "a.json:2: got '2}]', expected JSON (Expecting ':'"),
        ("a.json", '[{"x": 1}\n{"x": 2}]', "a.json:2: got '{\"x\": 2}]', expected ','"),
        ("a.json", '[{"x": 1},\n', "a.json:2: got the end of the file, expected JSON"),
        ("a.json", '{"rows": [\n]}', "a.json:2: got '}', expected an array of rows, or an object"),
        ("a.json", "12", "a.json:1: got '12', expected an array of rows, or {\"data\": [rows]}"),
        ("a.json", "[1]", "a.json:1: got a int, expected an object"),
        ("a.json", b'[{"x": "\xff"}]', "a.json:1: got bytes that are not UTF-8"),
        ("a.csv", "x,y\n1\n", "a.csv:2: got 1 columns, expected 2 as in the header"),
        ("a.csv", "x,y\n1,2,3\n", "a.csv:2: got 3 columns, expected 2 as in the header"),
        ("a.csv", "x,y\n1,2,\n", "a.csv:2: got 3 columns, expected 2 as in the header"),
        ("a.csv", ",x,y,\n0,1,2,,\n", "a.csv:2: got 5 columns, expected 4 as in the header"),
        (
            "a.csv",
            "x,y,\n\n1,2,3\n",
            "a.csv:3: got '3' in a column without a name, expected nothing",
        ),
        ("a.csv", "x,,y\n1,2,3\n", "a.csv:1: got no name for column 2 of 3, expected a name for"),
        ("a.csv", "\nx,y,x\n1,2,3\n", "a.csv:2: got the column x twice, expected it once"),
        ("a.csv", ",,\n1,2,3\n", "a.csv:1: got 3 columns without a name, expected a header"),
        ("a.csv", 'x\n"a" b\n"c', "a.csv:2: got a row that is not CSV (',' expected"),
        ("a.csv", "labels\nx\n", "a.csv:2 labels: got 'x', expected JSON in this column"),
        ("a.parquet", "x", "a.parquet: got "),
        ("a.txt", b"one\n\xff", "a.txt:2: got bytes that are not UTF-8"),
        ("a.csv", b"x\n\n\xff\n", "a.csv:3: got bytes that are not UTF-8"),
        ("a.jsonl", '{"x": "\\udc97"}', "a.jsonl:1 x: got the lone surrogate '\\udc97' as charact"),
        ("a.jsonl", b'{"x": "\xed\xb2\x97"}', "a.jsonl:1 x: got the lone surrogate '\\udc97' as"),
        (
            "a.json",
            '[{"messages": [\n{"content": "a \\ud83d b"}]}]',
            "a.json:1 messages[0].content: got the lone surrogate '\\ud83d' as character 3, exp",
        ),
        (
            "a.jsonl",
            '\n{"tools": [{"\\udfff": 1}]}',
            "a.jsonl:2 tools[0].\\udfff: got the lone surr",
        ),
        ("a.csv", 'messages\n"[""\\udc97""]"\n', "a.csv:2 messages[0]: got the lone surrogate"),
        ("a.jsonl", DEEP, "a.jsonl:1: got values nested too deep to be"),
        ("a.json", f"[\n{DEEP}]", "a.json:2: got values nested too deep to be"),
        ("a.json", DEEP, "a.json:1: got values nested too deep to be"),
        (
            "a.csv",
            f"labels\n{DEEP_LIST}\n",
            "a.csv:2 labels: got values nested too deep to be read",
        ),
        (
            "a.jsonl",
            '{"x":' * 101 + "1" + "}" * 101,
            "a.jsonl:1 x: got values nested more than 100",
        ),
        ("a.jsonl", f'{{"x": {HUGE}}}', "a.jsonl:1: got an integer of too many digits (Exceeds"),
        (
            "a.json",
            f'[{{"x": 1}},\n{{"x": {HUGE}}}]',
            "a.json:2: got an integer of too many digits",
        ),
        ("a.csv", f"labels\n{HUGE}\n", "a.csv:2 labels: got an integer of too many dig"),
    ],
)
def test_wrong_content_names_file_and_line(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ConfigError) as caught:
        rows_of(path)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "train.jsonl",
            "got {0}/train.jsonl, expected a file that exists; did you mean trian.jsonl?",
        ),
        (
            "none/train.json",
            "got {0}/none/train.json, expected a file that exists; there is no folder",
        ),
        (
            "",
            "got the folder {0}, expected a file or a hub dataset; list its files, such as {0}/tri",
        ),
        (
            "rows.zip",
            "got {0}/rows.zip, expected a file that ends in .json, .jsonl, .csv, .parquet",
        ),
    ],
)
def test_wrong_sources_are_named(tmp_path, source, message):
    write(tmp_path, "trian.jsonl", "")
    write(tmp_path, "rows.zip", "")
    with pytest.raises(ConfigError) as caught:
        read_rows(str(tmp_path / source).rstrip("/"), FIELD, ("train",))
    assert str(caught.value).startswith(f"{FIELD}: {message.format(tmp_path)}")


def test_hub_datasets_try_splits_in_order(monkeypatch):
    def load_dataset(name: str, subset: str | None, split: str):
        if subset is not None:
            return [{"text": subset, "question": name}]
        if split != "test":
            raise ValueError(f"Unknown split {split}")
        return [{"text": name}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("owner/rows", FIELD, ("validation", "test"))
    assert list(rows) == [("owner/rows[test]:1", {"text": "owner/rows"})]
    with pytest.raises(ConfigError) as caught:
        read_rows("owner/rows", FIELD, ("train",))
    assert str(caught.value).startswith(
        f"{FIELD}: got owner/rows, expected a file that exists, and there is none of that name, or "
        "a hub dataset, which did not load (split train: ValueError: Unknown split train)"
    )


@pytest.mark.parametrize("place", ["a file", "the hub"])
def test_nulls_that_arrow_filled_in_are_dropped_at_every_depth(tmp_path, monkeypatch, place):
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "calls": calls}],
            "tools": [{"name": "f", "parameters": {"properties": properties}}],
            "note": note,
        }
        for calls, properties, note in (
            ([{"arguments": {"city": "Ulm"}}], {"city": {"type": "string"}}, None),
            ([{"arguments": {"zone": "CET"}, "id": "7"}], {"zone": {"enum": ["a", None]}}, "x"),
        )
    ]
    table = pyarrow.Table.from_pylist(rows)
    name = "owner/rows"
    if place == "a file":
        name = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(table, name)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset(table))
    assert [fields for _, fields in read_rows(name, "data.train[0]", ("train",))] == rows


def test_nulls_that_the_user_wrote_stay(tmp_path):
    row = {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"a": None}}]}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert [fields for _, fields in read_rows(str(path), "data.train[0]", ())] == [row]
    text = {"messages": [{"arguments": json.dumps({"a": None})}]}
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([text]), table)
    assert [fields for _, fields in read_rows(str(table), "data.train[0]", ())] == [text]


def test_a_subset_of_a_hub_dataset_is_asked_for_and_named(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, subset, split: [{"body": f"{name} {subset} {split}"}]
    )
    columns = Columns({"text": "body"})
    rows = read_rows("owner/rows", FIELD, ("train",), "en", columns)
    assert list(rows) == [("owner/rows[en, train]:1", {"text": "owner/rows en train"})]


def test_every_kind_of_file_that_is_let_in_has_a_reader():
    assert tuple(READERS) == DATA_SUFFIXES
