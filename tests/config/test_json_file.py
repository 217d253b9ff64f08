# SPDX-License-Identifier: Apache-2.0
"""Files of one JSON object: read as they are, or refused with their name."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config.json_file import MOST_LEVELS, parse_object, read_object
from dsjax.errors import ConfigError
from dsjax.weights.safetensors import read_header

SPOILT = {
    "deep_lists": (b'{"a": ' + b"[" * 100_000, "nested deeper than 100 levels"),
    "deep_objects": (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "nested deeper than 100 levels"),
    "less_deep": (b'{"a":' * 101 + b"1" + b"}" * 101, "nested deeper than 100 levels"),
    "huge_integer": (b'{"a": ' + b"9" * 5_000 + b"}", "5000 digits"),
    "not_utf8": (b'{"a": "\xff"}', "can't decode byte 0xff"),
    "utf16": ('{"a": 1}'.encode("utf-16"), "can't decode"),
    "half_a_character": (b'{"a": ["\\ud83d"]}', "surrogates not allowed"),
    "half_a_key": (b'{"\\ude00": 1}', "surrogates not allowed"),
    "empty": (b"", "Expecting value"),
    "two": (b"{}{}", "Extra data"),
    "list": (b"[]", "got a JSON list"),
    "null": (b"null", "got a JSON NoneType"),
}


@pytest.mark.parametrize(("content", "part"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_file_is_refused_by_its_name(tmp_path: Path, content: bytes, part: str):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_object(file, "model.path")
    said = str(refused.value)
    assert said.startswith("model.path: got ") and str(file) in said and part in said
    assert len(said) < 500


def test_what_is_nested_less_deeply_is_read():
    text = '{"a": ' * (MOST_LEVELS - 1) + "[]" + "}" * (MOST_LEVELS - 1)
    assert parse_object(text.encode(), "file", "field") == json.loads(text)


def test_an_escaped_character_of_two_halves_is_read():
    assert parse_object(rb'{"\ud83d\ude00": 1}', "file", "field") == {"\U0001f600": 1}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def _spoil(content: bytes, at: int, piece: bytes, length: int) -> bytes:
    """Replace some bytes of a file by others."""
    at %= len(content) + 1
    return content[:at] + piece + content[at + length :]


def _is_read_or_refused(tree: dict, at: int, piece: bytes, length: int) -> None:
    content = _spoil(json.dumps(tree).encode(), at, piece, length)
    try:
        found = parse_object(content, "some.json", "model.path")
    except ConfigError as error:
        assert "some.json" in str(error)
        return
    assert json.dumps(found) == json.dumps(json.loads(content))
    json.dumps(found, ensure_ascii=False).encode()


_spoilt_objects = given(
    st.dictionaries(st.text(), VALUES, max_size=6),
    st.integers(0, 10_000),
    st.binary(max_size=3) | st.sampled_from([b"[" * 2_000, b"9" * 4_400, b"NaN", b"\\ud800", b'"']),
    st.integers(0, 3),
)


@settings(max_examples=60)
@_spoilt_objects
def test_a_file_with_damaged_bytes_is_read_or_refused(tree, at, piece, length):
    _is_read_or_refused(tree, at, piece, length)


@pytest.mark.slow
@settings(max_examples=400)
@_spoilt_objects
def test_many_files_with_damaged_bytes_are_read_or_refused(tree, at, piece, length):
    _is_read_or_refused(tree, at, piece, length)


@pytest.mark.parametrize(
    "header",
    [
        *(b"[" * 50_000, b'{"a": {"dtype": ' + b"[" * 50_000, b'{"a": 5}', b'{"a": {}}', b"\xff"),
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5_000 + b'], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [9223372036854775808], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"1," * 999 + b'1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 5, "data_offsets": [0, 4]}}',
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_spoilt_safetensors_header_is_refused_by_its_file(tmp_path: Path, header: bytes):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ConfigError) as refused:
        read_header(file)
    assert f"model.path: got a corrupt header in {file}" in str(refused.value)
    assert len(str(refused.value)) < 1_000
