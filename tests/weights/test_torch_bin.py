# SPDX-License-Identifier: Apache-2.0
"""`.bin` files: every dtype, and files that are refused."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dsjax.errors import ConfigError
from dsjax.weights.torch_bin import list_tensors, read_tensor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        list_tensors(path, "adapter.path")
    return str(caught.value)


@pytest.mark.parametrize(
    "dtype",
    "bfloat16 float16 float32 float64 float8_e4m3fn float8_e5m2 float8_e8m0fnu "
    "int8 int16 int32 int64 uint8 bool".split(),
)
def test_dtypes(path: Path, dtype: str) -> None:
    values = torch.tensor([0.5, 1.0, 2.0, 4.0]).to(getattr(torch, dtype))
    torch.save({"a": values}, path)
    (info,) = list_tensors(path)
    assert (info.dtype.name, info.shape) == (dtype, (4,))
    array = read_tensor(path, info, (slice(1, 4),))
    assert array.dtype == info.dtype
    assert array.astype(np.float32).tolist() == values.float()[1:].tolist()


class Evil:
    """Pickles into a call of a function."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return print, ("executed",)


def test_file_with_code_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Evil()}, path)
    assert refusal(path) == (
        f"adapter.path: got {path}, expected a file of tensors alone; loading it would run code, "
        "which dsjax never does, or it is not a torch file: use a safetensors copy"
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_or_legacy_file(path: Path, legacy: bool) -> None:
    torch.save({"a": torch.zeros(9)}, path, _use_new_zipfile_serialization=not legacy)
    if not legacy:
        path.write_bytes(path.read_bytes()[:-200])
    message = refusal(path)
    assert message.startswith(f"adapter.path: got {path}, which torch cannot read (")
    assert message.endswith(
        "), expected a file written by torch.save 1.6 or later; "
        "download it again or convert it to safetensors"
    )


def test_git_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert refusal(path).startswith(f"adapter.path: got a git-lfs pointer in {path}, expected the")


def test_file_without_a_dict(path: Path) -> None:
    torch.save([torch.zeros(2)], path)
    assert refusal(path) == (
        f"adapter.path: got a list in {path}, expected a dict of tensors; "
        "save the model's state_dict"
    )


def test_values_that_numpy_cannot_hold(path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.complex64), "n": 3}, path)
    message = refusal(path)
    assert message.startswith(
        f"adapter.path: got b (torch.complex64), n (int) in {path}, "
        "expected only tensors of torch.bfloat16, "
    )
    assert message.endswith("; convert the file to safetensors")


def test_without_torch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(2)}, path)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refusal(path) == (
        "adapter.path: got pytorch_model.bin, expected safetensors, or torch to read it with; "
        "`pip install torch`, or convert the file to safetensors"
    )
