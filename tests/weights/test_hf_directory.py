# SPDX-License-Identifier: Apache-2.0
"""Opening Hugging Face directories: what is read, what is refused and in which words."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsjax.errors import ConfigError
from dsjax.weights import storage
from dsjax.weights.hf_directory import SafetensorsWriter, index_json, open_source, shard_names

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BIN_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
A = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    entries = [(name, value.dtype, value.shape) for name, value in tensors.items()]
    with SafetensorsWriter(path, entries) as writer:
        for name, value in tensors.items():
            writer.append(name, value)


def write_index(path: Path, weight_map: dict[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A directory with one safetensors file."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(tmp_path / "model.safetensors", {"b": B, "a": A})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A directory with two safetensors files and their index."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(tmp_path / SHARDS[0], {"b": B})
    write_safetensors(tmp_path / SHARDS[1], {"a": A})
    write_index(tmp_path / "model.safetensors.index.json", {"a": SHARDS[1], "b": SHARDS[0]})
    return tmp_path


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A directory with two torch files, which share a storage inside, and their index."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    a = torch.tensor(A)
    torch.save({"a": a, "tied": a, "t": a.T, "scalar": torch.tensor(7)}, tmp_path / BIN_SHARDS[0])
    b = torch.tensor(B.astype(np.float32)).bfloat16()
    torch.save({"b": torch.nn.Parameter(b), "none": torch.zeros(0, 3)}, tmp_path / BIN_SHARDS[1])
    names = {"a": 0, "tied": 0, "t": 0, "scalar": 0, "b": 1, "none": 1}
    write_index(
        tmp_path / "pytorch_model.bin.index.json",
        {name: BIN_SHARDS[i] for name, i in names.items()},
    )
    return tmp_path


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal in dtype, shape and bytes, so that NaN patterns count too."""
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


def refusal(path: Path | str, revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        open_source(path, revision)
    return str(caught.value)


# Reading


def test_single_file(single: Path) -> None:
    source = open_source(str(single))
    assert (source.directory, source.config) == (single, {"model_type": "llama"})
    assert (source.files, list(source.tensors)) == (["model.safetensors"], ["b", "a"])
    info = source.tensors["a"]
    assert (info.file, info.dtype, info.shape) == ("model.safetensors", np.float32, (4, 3))
    content = (single / "model.safetensors").read_bytes()
    assert content[info.start : info.end] == A.tobytes() and info.nbytes == 48
    assert same(source.read("a"), A) and same(source.read("b"), B)
    assert source.read("a").flags.writeable
    assert source.read_bytes("a", 4, 8) == A.tobytes()[4:12]
    assert source.index_text() is None
    header = source.raw_header("model.safetensors")
    assert content[8:].startswith(header) and json.loads(header)["__metadata__"] == {"format": "pt"}
    assert source.file_headers() == {"model.safetensors": header}


def test_sharded_files(sharded: Path) -> None:
    source = open_source(sharded)
    assert (source.files, list(source.tensors)) == (list(SHARDS), ["b", "a"])
    assert same(source.read("a"), A) and same(source.read("b"), B)
    assert source.index_text() == (sharded / "model.safetensors.index.json").read_text()


def test_read_from_threads(sharded: Path) -> None:
    source = open_source(sharded)
    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(source.read, ["a", "b"] * 50))
    assert all(same(array, [A, B][i % 2]) for i, array in enumerate(arrays))


def test_large_rows_drop_their_pages_and_stay_right(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    big = np.arange(3 << 20, dtype=np.float32).reshape(3, -1)
    write_safetensors(tmp_path / "model.safetensors", {"big": big})
    assert same(open_source(tmp_path).read("big", (slice(0, 3), slice(5, None))), big[:, 5:])


def test_without_weights_nothing_of_them_is_touched(single: Path) -> None:
    (single / "model.safetensors").write_text(POINTER)
    source = open_source(single, weights=False)
    assert (source.tensors, source.files, source.index_text()) == ({}, [], None)
    assert source.config["model_type"] == "llama"


def test_torch_files(pickled: Path) -> None:
    source = open_source(pickled)
    assert list(source.tensors) == ["a", "tied", "t", "scalar", "b", "none"]
    assert source.files == list(BIN_SHARDS)
    expected = {"a": A, "tied": A, "t": A.T, "scalar": np.array(7), "b": B}
    expected["none"] = np.zeros((0, 3), np.float32)
    for name, array in expected.items():
        assert same(source.read(name), array), name
    assert same(source.read("t", (slice(1, 3), slice(0, 2))), A.T[1:3, :2])
    assert source.read_bytes("b", 2, 4) == B.tobytes()[2:6]
    assert source.tensors["a"].start == source.tensors["a"].end == -1
    assert (source.file_headers(), source.index_text()) == ({}, None)


def test_single_torch_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.tensor(A)}, tmp_path / "pytorch_model.bin")
    assert same(open_source(tmp_path).read("a"), A)


def test_safetensors_are_preferred_to_torch_files(single: Path) -> None:
    (single / "pytorch_model.bin").write_text(POINTER)
    assert open_source(single).files == ["model.safetensors"]


BLOCK = np.arange(72).reshape(6, 4, 3).astype(ml_dtypes.bfloat16)
SLICE = st.slices(6).filter(lambda part: part.step in (None, 1))


@given(
    array=st.sampled_from([(6, 4, 3), (1,), (5,), (), (0, 3), (3, 0)]).map(
        lambda shape: np.arange(np.prod(shape)).reshape(shape).astype(ml_dtypes.bfloat16)
    ),
    index=st.lists(SLICE, max_size=3),
)
@example(BLOCK, [slice(None), slice(None), slice(0, 1)])  # flat as it lies, with gaps
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_slices(tmp_path: Path, kind: str, array: np.ndarray, index: list[slice]) -> None:
    (tmp_path / "config.json").write_text("{}")
    if kind == "safetensors":
        write_safetensors(tmp_path / "model.safetensors", {"pad": B, "x": array})
    else:
        torch.save(
            {"x": torch.tensor(array.astype(np.float32)).bfloat16()}, tmp_path / "pytorch_model.bin"
        )
    part = tuple(index[: array.ndim])
    read = open_source(tmp_path).read("x", part)
    assert same(read, array[part])
    # Nothing but itself is kept, and what brings it to where jax takes it without a copy.
    assert read.base is None or read.base.nbytes <= read.nbytes + storage.ALIGNMENT


# Files beside the weights


def test_files_beside_the_weights(single: Path) -> None:
    kept = ["LICENSE-MODEL", "NOTICE", "README.md", "assets/chat_template.jinja", "config.json"]
    kept += ["generation_config.json", "tokenizer.json"]
    others = ["adapter_model.safetensors", "flax_model.msgpack", ".hidden", "notes.txt"]
    others += ["modeling_deepseek.py", "assets/tokenizer.json", ".cache/tokenizer.json"]
    for name in [*kept, *others]:
        (single / name).parent.mkdir(exist_ok=True)
        if name != "config.json":
            (single / name).write_text("{}")
    assert open_source(single).aux_files() == [single / name for name in kept]


def test_links_of_the_hubs_cache_count_as_files(tmp_path: Path) -> None:
    cache = tmp_path / "models--deepseek-ai--tiny"
    snapshot = cache / "snapshots" / "0123"
    for folder in (snapshot, cache / "blobs"):
        folder.mkdir(parents=True)
    (cache / "blobs" / "a").write_text("{}")
    write_safetensors(cache / "blobs" / "b", {"a": A})
    (snapshot / "config.json").symlink_to("../../blobs/a")
    (snapshot / "model.safetensors").symlink_to("../../blobs/b")
    (snapshot / "broken.json").symlink_to(snapshot / "nowhere")
    source = open_source(snapshot)
    assert same(source.read("a"), A) and source.aux_files() == [snapshot / "config.json"]


# The names to write


def test_shard_names() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == list(SHARDS)


def test_index_json() -> None:
    text = index_json({SHARDS[0]: [("b", 12)], SHARDS[1]: [("a", 48)]})
    expected = (
        '{\n  "metadata": {\n    "total_size": 60\n  },\n  "weight_map": {\n'
        f'    "a": "{SHARDS[1]}",\n    "b": "{SHARDS[0]}"\n  }}\n}}\n'
    )
    assert text == expected


# Places


def test_path_that_is_nothing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == (
        f"model.path: got '{tmp_path}/absent', expected a directory or a hub id; there is no such "
        "directory and a hub id has the form organization/name"
    )


def test_path_that_is_a_file(single: Path) -> None:
    assert refusal(single / "config.json") == (
        f"model.path: got the file '{single}/config.json', expected the directory that holds "
        f"config.json; give '{single}'"
    )


def test_revision_of_a_directory(single: Path) -> None:
    assert refusal(single, revision="main") == (
        f"model.revision: got 'main' with the local directory '{single}', expected null; "
        "a revision selects a version on the hub"
    )


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert refusal(single) == (
        f"model.path: got '{single}', expected a model directory with config.json; "
        "found model.safetensors"
    )
    (single / "adapter_config.json").write_text("{}")
    assert refusal(single).endswith("; it holds a PEFT adapter, give its path as adapter.path")


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{", "invalid JSON in {} (Expecting"),
        ("[]", "a JSON list in {},"),
        ("\xff", "invalid JSON"),
    ],
)
def test_config_that_is_no_object(single: Path, text: str, got: str) -> None:
    (single / "config.json").write_bytes(text.encode("latin-1"))
    message = refusal(single)
    assert message.startswith(f"model.path: got {got.format(single / 'config.json')}")
    assert "expected a JSON object; correct it" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_git_lfs_pointer(single: Path, name: str) -> None:
    (single / name).write_text(POINTER)
    assert refusal(single) == (
        f"model.path: got a git-lfs pointer in {single / name}, expected the file itself; "
        "run `git lfs pull` in that directory, or download the file"
    )


# Sets of weight files


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    assert refusal(single) == (
        f"model.path: got {single} without weights, expected model.safetensors, "
        "model.safetensors.index.json, pytorch_model.bin or pytorch_model.bin.index.json; "
        "found config.json"
    )


@pytest.mark.parametrize("kind", ["sharded", "pickled"])
def test_no_index(kind: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(kind)
    next(directory.glob("*.index.json")).unlink()
    shards = SHARDS if kind == "sharded" else BIN_SHARDS
    assert refusal(directory) == (
        f"model.path: got {shards[0]}, {shards[1]} in {directory} without an index, expected "
        "model.safetensors.index.json or pytorch_model.bin.index.json beside the files; download it"
    )


@pytest.mark.parametrize("kind", ["sharded", "pickled"])
def test_missing_shards_are_all_named(kind: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(kind)
    index = next(directory.glob("*.index.json"))
    weight_map = {f"x{i}": f"shard-{i}.bin" for i in range(12)}
    write_index(index, json.loads(index.read_text())["weight_map"] | weight_map)
    message = refusal(directory)
    assert all(f"{file}, " in message for file in weight_map.values())
    assert f"expected the 14 files that {index.name} names; download the missing ones" in message


@pytest.mark.parametrize("name", ["model.safetensors", "model-00003-of-00003.safetensors"])
def test_weight_file_that_the_index_does_not_name(sharded: Path, name: str) -> None:
    write_safetensors(sharded / name, {"c": A})
    assert refusal(sharded) == (
        f"model.path: got {name} in {sharded}, expected only weight files that "
        "model.safetensors.index.json names; remove what is left over from another save, "
        "or correct the index"
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_weight_map(sharded: Path, content: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    assert refusal(sharded) == (
        f"model.path: got {index} without a weight_map, expected tensor names with the files that "
        "hold them; download the index again"
    )


@pytest.mark.parametrize("place", ["../model.safetensors", "", "config.json", 3, None])
def test_index_that_names_no_file(sharded: Path, place: object) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": place, "b": SHARDS[0]}}))
    assert refusal(sharded) == (
        f"model.path: got {place!r} in {index}, expected names of .safetensors or .bin files "
        "beside it; correct its weight_map"
    )


@pytest.mark.parametrize("kind", ["sharded", "pickled"])
def test_index_lists_tensors_that_no_file_holds(kind: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(kind)
    index = next(directory.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    write_index(index, weight_map | {f"x{i}": weight_map["a"] for i in range(10)})
    names = ", ".join(f"x{i} in {weight_map['a']}" for i in range(8))
    assert refusal(directory) == (
        f"model.path: got an index that lists {names} and 2 more, expected the files to hold what "
        "the index lists; these tensors are not there, download the file or the index again"
    )


def test_files_hold_tensors_that_the_index_does_not_list(sharded: Path) -> None:
    write_safetensors(sharded / SHARDS[1], {"a": A, "c": A})
    assert refusal(sharded) == (
        f"model.path: got c in {SHARDS[1]}, expected the index to list every tensor; these are "
        "missing in it, download the index again"
    )


def test_tensor_in_two_files(sharded: Path) -> None:
    write_safetensors(sharded / SHARDS[1], {"a": A, "b": B})
    assert refusal(sharded) == (
        f"model.path: got b in {SHARDS[0]} and {SHARDS[1]}, expected each tensor in one file"
    )


def test_problems_of_all_files_are_reported_together(sharded: Path) -> None:
    for shard in SHARDS:
        (sharded / shard).write_text(POINTER)
    assert [line.split(", ")[0] for line in refusal(sharded).splitlines()] == [
        f"model.path: got a git-lfs pointer in {sharded / shard}" for shard in SHARDS
    ]
