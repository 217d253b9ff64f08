# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors.

In: a folder or a URL of one, or our arrays. Out: our spec and arrays, or PEFT's tensors by its
names. PEFT drops unknown tensors without a word and only warns of missing ones; here both are
errors, and so is every field of the config that changes the numbers and that we do not implement.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from dsjax.adapters import ADAPTERS, method_of
from dsjax.adapters.method import AdapterConfig
from dsjax.config import AdapterSection
from dsjax.config.inputs import check_adapter_path
from dsjax.config.json_file import read_object
from dsjax.distributed.checksums import digest
from dsjax.distributed.sharding import Leaf
from dsjax.errors import ConfigError, raise_all
from dsjax.models import Model
from dsjax.models.config_checks import shown
from dsjax.models.tensor_names import mismatches
from dsjax.weights.safetensors import TensorInfo, read_header, read_tensor
from dsjax.weights.storage import Folder, file_digest, in_order, open_folder

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "exclude_modules",
    "layer_replication",
    "trainable_token_indices",
    "arrow_config",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
"""Fields that change what an adapter computes, refused unless empty or a key of the method."""

_WITHOUT_EFFECT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode"),
)
"""Fields of all PEFT configs that are looked at elsewhere, or change nothing of a saved adapter."""


def read_spec(path: str, section: AdapterSection | None = None) -> AdapterConfig:
    """Read adapter_config.json.

    Args:
        path: the adapter's folder.
        section: the YAML's, which says what PEFT's file cannot.

    Raises:
        ConfigError: no such folder, not an adapter that we implement, or fields that we would have
            to ignore.
    """
    config = _read_config(_open(path))
    kind = str(config.get("peft_type"))
    field = f"adapter.path {path}/{CONFIG}"
    if kind not in ADAPTERS:
        got = shown(config.get("peft_type"))
        raise ConfigError(f"{field} peft_type: got {got}, expected {' or '.join(ADAPTERS)}")
    method, problems = ADAPTERS[kind], []
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"{field} task_type: got {shown(config['task_type'])}, expected CAUSAL_LM")
    problems += [
        f"{field} {name}: got {shown(config[name])}, expected it empty; it is not implemented"
        for name in _REFUSED
        if config.get(name) and name not in method.keys
    ]
    raise_all(problems + method.peft_problems(config, field))
    return method.from_peft(config, section or AdapterSection(path=path))


def unknown_fields(path: str) -> list[str]:
    """Fields of adapter_config.json that PEFT 0.21 has not, and so does not use either."""
    config = _read_config(_open(path))
    known = {*_REFUSED, *_WITHOUT_EFFECT, *AdapterSection.model_fields}
    known = known.union(*(method.without_effect for method in ADAPTERS.values()))
    return [name for name, value in config.items() if value and name not in known]


def contents(path: str, spec: AdapterConfig) -> str:
    """Digest an adapter, wherever it lies: what it is, and all its numbers."""
    # Checkpoints know it by the names that these classes had first, and by the digest of that time.
    described = repr(spec).replace("Config(", "Spec(", 1)
    blake2b = partial(hashlib.blake2b, digest_size=16)
    return digest([described, file_digest(_open(path).files[TENSORS], blake2b)])


def _open(path: str) -> Folder:
    check_adapter_path(path)
    return open_folder(path, "adapter.path")


def _read_config(folder: Folder) -> dict[str, Any]:
    if CONFIG not in folder.files:
        names = list(folder.files)[:8]
        raise ConfigError(f"adapter.path: got {folder} without {CONFIG}; found {', '.join(names)}")
    return read_object(folder.files[CONFIG], "adapter.path")


def check_tensors(
    path: str,
    model: Model,
    spec: AdapterConfig,
    leaves: Mapping[str, Leaf],
    read_base: Callable[[str], np.ndarray],
) -> None:
    """Hold the file's tensors against what its config declares for this model.

    Beside an adapter on `lm_head` PEFT saves that module's own weight; it has to be the model's.
    """
    folder = _open(path)
    infos = _tensor_infos(folder)
    found = {name: info.shape for name, info in infos.items()}
    wanted = method_of(spec).shapes(model, spec, leaves)
    file = f"adapter.path {path}/{TENSORS}"
    copies = {key: _base_name(key, wanted) for key in found if key not in wanted}
    copies = {key: name for key, name in copies.items() if name}
    problems = mismatches(
        wanted,
        {key: shape for key, shape in found.items() if key not in copies},
        rule="for this model",
        config=CONFIG,
        place=file,
        prefix=f"{file} ",
    )
    for key, name in copies.items():
        if not _same_weight(read_tensor(folder.files[TENSORS], infos[key]), read_base(name)):
            problems.append(
                f"{file} {key}: got other values than the model's {name}, expected the same; "
                "give the model that the adapter was trained on as model.path"
            )
    raise_all(problems)
    unreadable = method_of(spec).file_problems(model, spec, lambda: _read_all(folder))
    raise_all(f"{file} {problem}" for problem in unreadable)


def _base_name(key: str, wanted: Mapping[str, Any]) -> str:
    """Return the model's tensor that a saved `base_layer` is a copy of; empty if it is none."""
    module = key.removesuffix(".base_layer.weight")
    if module == key or not any(name.startswith(f"{module}.") for name in wanted):
        return ""
    return module.removeprefix("base_model.model.") + ".weight"


def _same_weight(copy: np.ndarray, weight: np.ndarray) -> bool:
    return copy.shape == weight.shape and np.array_equal(copy.astype(weight.dtype), weight)


def read_params(
    path: str, model: Model, spec: AdapterConfig, leaves: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Return the trained arrays of an adapter, stacked as the model's leaves are, in float32."""
    return method_of(spec).from_file(model, spec, leaves, read_tensors(path))


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """Return the tensors of an adapter's file by PEFT's names, in float32."""
    return _read_all(_open(path))


def _read_all(folder: Folder) -> dict[str, np.ndarray]:
    """Return the file's tensors in float32, without copies of the model's own weights."""
    infos = _tensor_infos(folder)
    wanted = [name for name in infos if not name.endswith(".base_layer.weight")]
    reads = [partial(read_tensor, folder.files[TENSORS], infos[name]) for name in wanted]
    arrays = in_order(reads, folder.reads_ahead)
    return {name: array.astype(np.float32) for name, array in zip(wanted, arrays, strict=True)}


def _tensor_infos(folder: Folder) -> dict[str, TensorInfo]:
    if TENSORS not in folder.files:
        raise ConfigError(
            f"adapter.path: got {folder} without {TENSORS}, expected PEFT's safetensors file; "
            "save the adapter with PEFT's safe_serialization"
        )
    return {info.name: info for info in read_header(folder.files[TENSORS], "adapter.path")[1]}
