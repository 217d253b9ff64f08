# SPDX-License-Identifier: Apache-2.0
"""Damaged data files of every kind: rows, or a refusal that begins with the file's name."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dsjax.config import DataSection
from dsjax.data import load_examples
from dsjax.data.files import read_rows
from dsjax.errors import ConfigError

ROWS = [
    {"instruction": "Add é and 🙂", "input": "", "output": "x" * 40, "id": 2**40},
    {"instruction": 'say "x"\nagain', "input": "[1, 2]", "output": "b", "id": -1},
    {"instruction": "Why?", "input": "a,b", "output": "So.", "id": 0},
] * 4
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]}
    for text in ("hi", "é", "a\\b")
]
TOKENS = [{"input_ids": list(range(9)), "labels": [-100] * 4 + [5] * 5}] * 3


def _csv(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def _lines(rows: list[dict[str, Any]], ascii_only: bool = True) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()


WHOLE = {
    "lines.jsonl": _lines(ROWS),
    "utf8.jsonl": _lines(ROWS, ascii_only=False),
    "chats.jsonl": _lines(CHATS),
    "tokens.jsonl": _lines(TOKENS),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "data.json": json.dumps({"version": 1, "data": CHATS}, ensure_ascii=False).encode(),
    "rows.csv": _csv(ROWS),
    "chats.csv": _csv([{"messages": json.dumps(chat["messages"])} for chat in CHATS]),
    "rows.parquet": _parquet(ROWS),
    "plain.parquet": _parquet(ROWS, compression="none", use_dictionary=False),
    "chats.parquet": _parquet(CHATS, compression="gzip"),
    "tokens.parquet": _parquet(TOKENS, write_page_checksum=True),
    "text.txt": "\n".join(row["instruction"] for row in ROWS).encode(),
}
# What damages files of text in ways that single random bytes rarely do.
PIECES = [b"\\ud800", b"\xed\xa0\x80", b"\x00", b"\xff", b'"', b"\n", b",", b"9" * 5000, b"1e999"]
PIECES += [b"[" * 2000, b'{"a":' * 300, b"NaN", b"\xef\xbb\xbf", b"null", b"\r", b"\\u"]


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A valid file with a few cuts, flips and insertions; now and then bytes that were no file."""
    name = draw(st.sampled_from(sorted(WHOLE)))
    if draw(st.integers(0, 9)) == 0:
        return name, draw(st.binary(max_size=64))
    content = bytearray(WHOLE[name])
    kinds = st.sampled_from(["insert", "insert", "insert", "flip", "cut", "drop"])
    for kind in draw(st.lists(kinds, min_size=1, max_size=4)):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + draw(st.integers(1, 40))]
        else:
            content[at:at] = draw(st.sampled_from(PIECES) | st.binary(max_size=8))
    return name, bytes(content)


def rows_or_refusal(folder: Path, file: tuple[str, bytes], tokenizer: PreTrainedTokenizerFast):
    """Read a file by itself and into tokens: what fails, fails by a line that names the file."""
    path = folder / file[0]
    path.write_bytes(file[1])
    try:
        for origin, fields in read_rows(str(path), "data.train[0]", ()):
            assert origin.startswith(f"{path}:") and isinstance(fields, dict)
            repr(fields).encode()
    except ConfigError as error:
        assert str(error).startswith(f"{path}:")
    section = DataSection(train=[str(path)], max_length=64)
    try:
        assert len(load_examples(section.train, section, tokenizer, vocab_size=300))
    except ConfigError as error:
        empty = "data.train[0]: got", "data.train: got"
        assert all(line.startswith((f"{path}:", *empty)) for line in str(error).splitlines())


def test_the_files_are_whole(tmp_path):
    for name, content in WHOLE.items():
        (tmp_path / name).write_bytes(content)
        assert len(list(read_rows(str(tmp_path / name), "data.train[0]", ()))) >= 3


@given(file=damaged_files())
@settings(max_examples=60)
def test_damaged_files_are_rows_or_refused(tmp_path_factory, tokenizers, file):
    rows_or_refusal(tmp_path_factory.getbasetemp(), file, tokenizers["v3"])


@pytest.mark.slow
@given(file=damaged_files())
@settings(max_examples=3000)
def test_damaged_files_are_rows_or_refused_often(tmp_path_factory, tokenizers, file):
    rows_or_refusal(tmp_path_factory.getbasetemp(), file, tokenizers["v3"])


@pytest.mark.parametrize("damage", ["cut", "flipped", "swapped", "foreign"])
def test_damaged_parquet_names_the_file(tmp_path, damage):
    path = tmp_path / "rows.parquet"
    whole = _parquet(ROWS, write_page_checksum=True)
    at = whole.index(b"Why?")
    spoilt = {
        "cut": whole[:-20],
        "flipped": whole[:at] + b"w" + whole[at + 1 :],
        "swapped": whole[-60:] + whole[60:-60] + whole[:60],
        "foreign": b"PAR1" + b"\xff" * 40 + b"PAR1",
    }
    path.write_bytes(spoilt[damage])
    with pytest.raises(ConfigError) as caught:
        list(read_rows(str(path), "data.train[0]", ()))
    assert str(caught.value).startswith(f"{path}: got ")
    assert "expected a Parquet file that can be read" in str(caught.value)


def test_parquet_names_the_row_that_is_not_text(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    with pytest.raises(ConfigError) as caught:
        list(read_rows(str(path), "data.train[0]", ()))
    assert str(caught.value).startswith(f"{path}:2: got UnicodeDecodeError")


def test_parquet_with_two_columns_of_one_name(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ConfigError) as caught:
        list(read_rows(str(path), "data.train[0]", ()))
    assert str(caught.value).startswith(f"{path}: got the column text twice, expected it once")
