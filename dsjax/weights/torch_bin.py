# SPDX-License-Identifier: Apache-2.0
"""Read the tensors of a `pytorch_model*.bin` file; the one place where the package imports torch.

In: a path. Out: the same `TensorInfo` records and fresh numpy arrays as from a safetensors file.
Not here: which files make up a checkpoint (`hf_directory`); writing, since exports are safetensors.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dsjax.errors import ConfigError
from dsjax.weights.safetensors import DTYPES, TensorInfo, is_lfs_pointer, lfs_problem

_TORCH_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "torch.bfloat16": DTYPES["BF16"],
        "torch.float16": DTYPES["F16"],
        "torch.float32": DTYPES["F32"],
        "torch.float64": DTYPES["F64"],
        "torch.float8_e4m3fn": DTYPES["F8_E4M3"],
        "torch.float8_e5m2": DTYPES["F8_E5M2"],
        "torch.float8_e8m0fnu": DTYPES["F8_E8M0"],
        "torch.int8": DTYPES["I8"],
        "torch.int16": DTYPES["I16"],
        "torch.int32": DTYPES["I32"],
        "torch.int64": DTYPES["I64"],
        "torch.uint8": DTYPES["U8"],
        "torch.bool": DTYPES["BOOL"],
    }
)


def list_tensors(path: Path, field: str = "model.path") -> list[TensorInfo]:
    """List the tensors of a `.bin` file, in its order, without reading their values.

    Raises:
        ConfigError: no torch, a damaged file, one whose loading would run code, or one that holds
            something other than tensors that numpy can hold.
    """
    tensors = _load(path, field)
    if not isinstance(tensors, dict):
        raise ConfigError(
            f"{field}: got a {type(tensors).__name__} in {path}, expected a dict of tensors; "
            "save the model's state_dict"
        )
    odd = [
        f"{name} ({getattr(value, 'dtype', type(value).__name__)})"
        for name, value in tensors.items()
        if str(getattr(value, "dtype", None)) not in _TORCH_DTYPES
    ]
    if odd:
        raise ConfigError(
            f"{field}: got {', '.join(odd)} in {path}, expected only tensors of "
            f"{', '.join(_TORCH_DTYPES)}; convert the file to safetensors"
        )
    return [
        TensorInfo(name, path.name, _TORCH_DTYPES[str(value.dtype)], tuple(value.shape), -1, -1)
        for name, value in tensors.items()
    ]


def read_tensor(
    path: Path, info: TensorInfo, index: tuple[slice, ...] | None = None
) -> Shaped[np.ndarray, "..."]:
    """Read a tensor, or the part that `index` selects, into a fresh array.

    The file is mapped anew for each tensor, so that only one tensor's pages are held at a time.
    """
    tensor = _load(path, "model.path")[info.name].detach()
    part = tensor[tuple(index or ())]
    # numpy has no bfloat16 and no float8 of torch's: pass the bytes. One column alone is flat as it
    # lies, with the others between its elements.
    octets = part.reshape(-1).contiguous().view(_torch(path, "model.path").uint8).numpy()
    return octets.copy().view(info.dtype).reshape(tuple(part.shape))


def _load(path: Path, field: str) -> Any:
    torch = _torch(path, field)
    if is_lfs_pointer(path):
        raise ConfigError(lfs_problem(path, field))
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{field}: got {path}, expected a file of tensors alone; loading it would run code, "
            "which dsjax never does, or it is not a torch file: use a safetensors copy"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{field}: got {path}, which torch cannot read ({reason}), expected a file written by "
            "torch.save 1.6 or later; download it again or convert it to safetensors"
        ) from error


def _torch(path: Path, field: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{field}: got {path.name}, expected safetensors, or torch to read it with; "
            "`pip install torch`, or convert the file to safetensors"
        ) from error
    return torch
