# SPDX-License-Identifier: Apache-2.0
"""The safetensors format against its own library, and files that break it."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dsjax.errors import ConfigError
from dsjax.weights.safetensors import DTYPES, SafetensorsWriter, read_header, read_tensor

A = np.arange(12, dtype=np.float32).reshape(4, 3)
Entry = tuple[str, str | np.dtype, tuple[int, ...]]


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    entries = [(name, value.dtype, value.shape) for name, value in tensors.items()]
    with SafetensorsWriter(path, entries) as writer:
        for name, value in tensors.items():
            writer.append(name, value)


def read(path: Path) -> dict[str, np.ndarray]:
    return {info.name: read_tensor(path, info) for info in read_header(path)[1]}


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_header(path, "adapter.path")
    return str(caught.value)


ARRAYS = st.builds(
    lambda code, shape, fill: np.frombuffer(
        np.random.default_rng(fill).integers(
            0, 2 if code == "BOOL" else 256, int(np.prod(shape)) * DTYPES[code].itemsize, np.uint8
        ),
        DTYPES[code],
    ).reshape(shape),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 99),
)


@given(arrays=st.lists(ARRAYS, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_round_trip_and_the_library_reads_it(tmp_path: Path, arrays: list[np.ndarray]) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"t{i}.é": array for i, array in enumerate(arrays)}
    write(path, tensors)
    assert path.read_bytes()[:8] == len(read_header(path)[0]).to_bytes(8, "little")
    assert len(read_header(path)[0]) % 8 == 0
    back = read(path)
    assert list(back) == list(tensors)
    with safe_open(path, "pt") as library:
        assert library.metadata() == {"format": "pt"}
        for name, array in tensors.items():
            assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
            assert back[name].tobytes() == array.tobytes()
            tensor = library.get_tensor(name)
            assert tuple(tensor.shape) == array.shape
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def library_file(path: Path) -> None:
    tensors = {"b": torch.ones(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    tensors |= {"e": torch.zeros(0, 2), "s": torch.tensor(1.0), "é": torch.ones(5).to(torch.uint8)}
    save_file(tensors, path, metadata={"format": "pt"})


def test_header_is_the_library_s_byte_for_byte(tmp_path: Path) -> None:
    library_file(tmp_path / "x.safetensors")
    write(tmp_path / "y.safetensors", read(tmp_path / "x.safetensors"))
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_raw_header_is_written_verbatim(tmp_path: Path) -> None:
    source, copy = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    header = {
        "b": {"data_offsets": [4, 8], "dtype": "F32", "shape": [1]},
        "__metadata__": {"by": "another tool"},
        "a": {"shape": [2, 1], "dtype": "BF16", "data_offsets": [0, 4]},
    }
    write_raw(source, json.dumps(header, indent=1).encode() + b"   ", bytes(range(8)))
    raw, infos = read_header(source)
    entries: list[Entry] = [(info.name, info.dtype, info.shape) for info in infos]
    assert [entry[0] for entry in entries] == ["a", "b"]
    with SafetensorsWriter(copy, entries, raw_header=raw) as writer:
        for info in infos:
            writer.append(info.name, read_tensor(source, info))
    assert copy.read_bytes() == source.read_bytes()
    with pytest.raises(ValueError, match="the header lists other tensors or another order"):
        SafetensorsWriter(copy, entries[::-1], raw_header=raw)


def test_rows_and_bytes_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entries: list[Entry] = [("none", "F32", (0, 3)), ("a", "F32", (4, 3)), ("b", "BF16", (2,))]
    with SafetensorsWriter(path, [*entries, ("end", "I8", (0,))], metadata={}) as writer:
        writer.append("a", A[:1])
        writer.append("a", A[1:].T.copy().T)
        writer.append("b", b"\x00\x3f")
        writer.append("b", np.ones(1, ml_dtypes.bfloat16))
    back = read(path)
    assert (back["a"] == A).all() and back["b"].astype(float).tolist() == [0.5, 1.0]
    assert list(back) == ["none", "a", "b", "end"]
    assert b"__metadata__" not in read_header(path)[0]


@pytest.mark.parametrize(
    ("name", "chunk", "message"),
    [
        ("b", A, "got b, expected a"),
        ("c", A, "got c, expected a"),
        ("a", A.astype(np.float16), r"a: got rows of float16\[4, 3\], expected rows of float32"),
        ("a", A.T, r"a: got rows of float32\[3, 4\], expected rows of float32\[4, 3\]"),
        ("a", np.concatenate([A, A]), "a got more than its 48 bytes"),
        ("a", A[:2], "a got 24 of its 48 bytes"),
        ("a", A, "b got 0 of its 4 bytes"),
    ],
)
def test_writer_refuses_what_does_not_fit(
    tmp_path: Path, name: str, chunk: np.ndarray, message: str
) -> None:
    entries: list[Entry] = [("a", "F32", (4, 3)), ("b", "F32", ())]
    with (
        pytest.raises(ValueError, match=message),
        SafetensorsWriter(tmp_path / "x.safetensors", entries) as writer,
    ):
        writer.append(name, chunk)


def test_writer_refuses_more_than_declared(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="got b, expected nothing more"),
        SafetensorsWriter(tmp_path / "x.safetensors", [("a", "F32", (4, 3))]) as writer,
    ):
        writer.append("a", A)
        writer.append("b", A)


def test_writer_refuses_a_dtype_without_a_code(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: safetensors has no dtype complex64"):
        SafetensorsWriter(tmp_path / "x.safetensors", [("a", np.dtype("complex64"), (1,))])


def test_writer_leaves_the_caller_s_error_alone(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError, match="mine"),
        SafetensorsWriter(tmp_path / "x.safetensors", [("a", "F32", (4, 3))]),
    ):
        raise KeyError("mine")


# Broken files


def test_truncated_values(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": A})
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert refusal(path) == (
        f"adapter.path: got {path} with {len(content) - 1} bytes, expected {len(content)} bytes as "
        "its header says; it is truncated, download the file again"
    )
    path.write_bytes(content + b"x")
    assert refusal(path).endswith("; it is longer than its header says, download the file again")


@pytest.mark.parametrize("content", [b"", b"\x01\x02", (999).to_bytes(8, "little") + b"{}"])
def test_truncated_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"adapter.path: got {path} with {len(content)} bytes, expected")
    assert message.endswith("it is truncated or not safetensors, download the file again")


def entry(dtype: object, shape: object, offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{nonsense", "JSONDecodeError: Expecting property name"),
        (b"\xff\xff", "UnicodeDecodeError: "),
        ([1], "ValueError: it is not an object of objects"),
        ({"a": 3}, "ValueError: it is not an object of objects"),
        ({"a": entry("F32", 3, [0, 4])}, "TypeError: "),
        ({"a": {"dtype": "F32"}}, "KeyError: 'data_offsets'"),
        ({"a": entry("F4", [2], [0, 1])}, "ValueError: a has dtype F4, readable are BF16, F16"),
        ({"a": entry("F32", [-1], [0, 4])}, "ValueError: a has shape [-1] and offsets [0, 4]"),
        ({"a": entry("F32", [1], [0, 1.5])}, "ValueError: a has shape [1] and offsets [0, 1.5]"),
        ({"a": entry("F32", [2], [0, 4])}, "ValueError: a lies at bytes "),
        ({"a": entry("F32", [1], [4, 8])}, "ValueError: a lies at bytes "),
        (
            {"a": entry("F32", [1], [0, 4]), "b": entry("F32", [1], [2, 6])},
            "ValueError: b lies at bytes ",
        ),
    ],
)
def test_corrupt_header(tmp_path: Path, header: object, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, header, bytes(8))
    message = refusal(path)
    assert message.startswith(f"adapter.path: got a corrupt header in {path} ({reason}")
    assert message.endswith("), expected a safetensors header; download the file again")


def test_file_that_shrinks_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": A})
    info = read_header(path)[1][0]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OSError, match=f"{path} ended at byte {info.end - 8}: it changed"):
        read_tensor(path, info)
