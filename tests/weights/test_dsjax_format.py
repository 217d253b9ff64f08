# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that to-flax wrote is read as it was, or refused by the name of what is damaged."""

import json
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from spoilt import spoilt

from dsjax.errors import ConfigError
from dsjax.weights.convert import to_flax
from dsjax.weights.dsjax_format import ARRAYS, MANIFEST, UNMODELLED, open_flax
from dsjax.weights.hf_directory import index_json, open_source

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stacks of two layers, tensors that are only carried, and an index."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.build_checkpoint(folder / "source", "llama_inv_freq", num_hidden_layers=2)
    tensors = open_source(folder / "source").tensors.values()
    index = index_json({"model.safetensors": [(info.name, info.nbytes) for info in tensors]})
    (folder / "source" / "model.safetensors.index.json").write_text(index)
    to_flax(str(folder / "source"), str(folder / "flax"), lambda done, total: None)
    return folder / "flax"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@cache
def _whole(path: Path) -> Tensors:
    return _read(path)


def _read(path: Path) -> Tensors:
    source = open_flax(path)
    return {name: source.read(name) for name in source.tensors}


def _is_read_or_refused(path: Path, checkpoint: Path) -> str:
    """The refusal; empty where the same tensors are read."""
    whole = _whole(checkpoint)
    try:
        found = _read(path)
    except ConfigError as error:
        assert str(path) in str(error) and len(str(error)) < 1_000
        return str(error)
    assert found.keys() == whole.keys()
    for name, values in whole.items():
        assert found[name].dtype == values.dtype and found[name].tobytes() == values.tobytes()
    return ""


def test_all_of_it_is_read(checkpoint: Path):
    assert _is_read_or_refused(checkpoint, checkpoint) == ""
    assert any("inv_freq" in name for name in _whole(checkpoint))


def _manifest(path: Path, **changes: Any) -> None:
    file = path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("content", [b"[]", b"null", b"7", b'{"format": 2}', b"{", b"[" * 90_000])
def test_another_value_is_no_manifest(copy: Path, checkpoint: Path, content: bytes):
    (copy / MANIFEST).write_bytes(content)
    assert MANIFEST in _is_read_or_refused(copy, checkpoint)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format": None}, "it has no format"),
        ({"format": 3}, "of format 3, expected 2"),
        ({"files": []}, "files: []"),
        ({"files": {"../model.safetensors": "{}"}}, "files: '../model.safetensors'"),
        ({"files": {"model.safetensors": "[]"}}, "a header of its files: ValueError"),
        ({"files": {"model.safetensors": None}}, "files: 'model.safetensors'"),
        ({"arrays": None}, "arrays: None"),
        ({"arrays": {"model.norm.weight": ["../x"]}}, "arrays: ['../x']"),
        ({"arrays": {"model.norm.weight": ["model.norm.weight", -1]}}, "arrays: ["),
        ({"arrays": {"elsewhere": ["model.norm.weight"]}}, "elsewhere is in none of its files"),
        ({"index": 3}, "index: 3"),
        ({"index": "{}"}, "its index is of other files"),
        ({"index": "["}, "invalid JSON"),
    ],
)
def test_a_manifest_of_another_form(
    copy: Path, checkpoint: Path, changes: dict[str, Any], part: str
):
    _manifest(copy, **changes)
    assert part in _is_read_or_refused(copy, checkpoint)


def test_two_tensors_at_one_place(copy: Path, checkpoint: Path):
    arrays = json.loads((copy / MANIFEST).read_text())["arrays"]
    name = next(name for name, place in arrays.items() if place[1:] == [1])
    _manifest(copy, arrays=arrays | {name: [arrays[name][0], 0]})
    assert "two tensors at one place" in _is_read_or_refused(copy, checkpoint)


def test_a_part_of_an_array_that_is_not_there_is_not_zeros(copy: Path, checkpoint: Path):
    part = next(file for file in sorted((copy / ARRAYS).rglob("*")) if file.name[0].isdigit())
    part.unlink()
    assert f"got a damaged {part.parent}" in _is_read_or_refused(copy, checkpoint)


def test_a_part_of_an_array_that_is_cut(copy: Path, checkpoint: Path):
    part = next(file for file in sorted((copy / ARRAYS).rglob("*")) if file.name[0].isdigit())
    part.write_bytes(part.read_bytes()[:-7])
    assert f"got a damaged {part.parent}" in _is_read_or_refused(copy, checkpoint)


@pytest.mark.parametrize(
    "changes", [{"dtype": "<i4"}, {"shape": [1]}, {"compressor": 1}, {"zarr_format": "x"}]
)
def test_an_array_of_another_kind(copy: Path, checkpoint: Path, changes: dict[str, Any]):
    file = sorted((copy / ARRAYS).rglob(".zarray"))[0]
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert f"got a damaged {file.parent}" in _is_read_or_refused(copy, checkpoint)


def test_what_is_only_carried_has_to_be_there(copy: Path, checkpoint: Path):
    (copy / UNMODELLED).unlink()
    assert UNMODELLED in _is_read_or_refused(copy, checkpoint)


def _spoil_the_manifest(checkpoint: Path, examples: int) -> None:
    tree = json.loads((checkpoint / MANIFEST).read_text())
    files = {name: json.loads(text) for name, text in tree["files"].items()}

    @settings(max_examples=examples)
    @given(spoilt(tree) | spoilt(files).map(partial(_with_headers, tree)))
    def read(content: bytes) -> None:
        whole = (checkpoint / MANIFEST).read_bytes()
        try:
            (checkpoint / MANIFEST).write_bytes(content)
            _is_read_or_refused(checkpoint, checkpoint)
        finally:
            (checkpoint / MANIFEST).write_bytes(whole)

    _whole(checkpoint)
    read()


def _with_headers(tree: dict[str, Any], headers: bytes) -> bytes:
    """The manifest with damaged headers, each a text of its own."""
    try:
        files = json.loads(headers)
    except (ValueError, RecursionError):
        files = {"model.safetensors": headers.decode("latin-1")}
    if isinstance(files, dict):
        files = {name: json.dumps(header) for name, header in files.items()}
    return json.dumps(tree | {"files": files}).encode()


def test_a_damaged_manifest_is_read_or_refused(checkpoint: Path):
    _spoil_the_manifest(checkpoint, examples=15)


@pytest.mark.slow
def test_many_damaged_manifests_are_read_or_refused(checkpoint: Path):
    _spoil_the_manifest(checkpoint, examples=300)
