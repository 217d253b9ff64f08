# SPDX-License-Identifier: Apache-2.0
"""Which files of a model's folder belong to the model, besides its weights.

In: the names of a folder's or a hub repository's files, and what its config.json and
tokenizer_config.json say. Out: the names of those that are read, kept beside converted weights and
copied into exports: configuration, tokenizer, chat templates, licences, model card, and what the
two files name. Nothing else travels, be it data, notes, archives, training state or an adapter.
Where transformers has no class for the model, the code that its config.json names goes along, which
is copied and never run. Not done here: reading folders (`hf_directory`), downloading (`hub`).
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsjax.config.json_file import read_object
from dsjax.errors import ConfigError
from dsjax.models import MODELS
from dsjax.weights.storage import Folder, read_at, size_of

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
ADAPTER_CONFIG = "adapter_config.json"

DECIDING = (CONFIG, TOKENIZER_CONFIG)
"""The files that name others."""

SUBFOLDERS = ("additional_chat_templates", "assets")
"""Where templates lie: transformers' folder, and that of V3.1's repository and its successors."""

_NAMES = frozenset(
    {
        *DECIDING,
        "generation_config.json",
        # tokenizer: the names of transformers' classes
        *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
        *("chat_template.jinja", "chat_template.json", "assets/chat_template.jinja"),
    }
)
_WEIGHTS_AND_CODE = (
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|npy|npz|onnx|onnx_data|pickle|pkl|py"
    r"|index\.json)"
)
_DATA = r".*\.(jsonl?|csv|tsv|parquet|arrow|zip|tar|gz|bz2|xz|zst|7z|sh|ipynb|js|so)"
_TEXT = r"(\.(txt|md|rst|pdf|html))?"
_PATTERNS = (
    re.compile(r"additional_chat_templates/[^/]+\.jinja"),
    re.compile(rf"(?i)(?!\.)(?!{_WEIGHTS_AND_CODE}$)(?!{_DATA}$)[^/]*licen[cs]e[^/]*"),
    re.compile(rf"(?i)(third[-_]?party[-_]?)?notices?{_TEXT}"),
    re.compile(rf"(?i)(copying|copyright|(acceptable[-_])?use[-_]policy){_TEXT}"),
    re.compile(r"(?i)(readme([-_]\w+)?|model[-_]?card)(\.(md|rst|txt))?"),
)


def kept_names(
    names: Collection[str], config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> list[str]:
    """List the files that belong to the model, code apart; sorted.

    Args:
        names: of the files in the folder, and as `folder/name` in `SUBFOLDERS`.
        config: the parsed config.json.
        tokenizer_config: the parsed tokenizer_config.json, empty if there is none.
    """
    named = set(_strings([config, tokenizer_config]))
    return sorted(name for name in names if _belongs(name) or (name in named and _may_name(name)))


def wanted_names(
    names: Collection[str], config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> list[str]:
    """List the files to bring to this machine so that `kept_files` can choose among them."""
    kept = kept_names(names, config, tokenizer_config)
    return kept + ([name for name in names if _is_module(name)] if needs_code(config) else [])


def kept_files(folder: Folder, config: Mapping[str, Any]) -> list[str]:
    """List a folder's files that belong to the model, with the code that it cannot do without."""
    tokenizer_config = read_tokenizer_config(folder)
    kept = kept_names(folder.files, config, tokenizer_config)
    if not needs_code(config):
        return kept
    modules = _modules(config, tokenizer_config)

    def read(name: str) -> str:
        file = folder.files[name]
        return read_at(file, 0, size_of(file)).tobytes().decode("utf-8", "replace")

    return sorted({*kept, *_with_imports(modules, folder.files, read)})


def read_tokenizer_config(folder: Folder) -> dict[str, Any]:
    """Return the parsed tokenizer_config.json; empty if there is none, or a damaged one.

    A damaged one is refused by whoever loads the tokenizer.
    """
    file = folder.files.get(TOKENIZER_CONFIG)
    try:
        return {} if file is None else read_object(file, "model.path")
    except ConfigError:
        return {}


def needs_code(config: Mapping[str, Any]) -> bool:
    """Whether transformers opens the model with the code of its repository only."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in MODELS and MODELS[kind].remote_code


def links_out(directory: Path, names: Collection[str]) -> list[str]:
    """List the files that are links out of the directory, and not into the hub's cache.

    What is copied into an export would be whatever the link leads to.
    """
    root = directory.resolve()
    targets = {name: (directory / name).resolve() for name in names}
    return [
        f"model.path: got {directory / name}, a link to {target} outside of the folder, expected "
        "the file itself; copy it into the folder"
        for name, target in targets.items()
        if not target.is_relative_to(root) and not _is_blob(target)
    ]


def _is_blob(path: Path) -> bool:
    """Whether a path is that of a file in the hub's cache, which snapshots link to."""
    folder = path.parent
    return folder.name == "blobs" and folder.parent.name.startswith("models--")


def _belongs(name: str) -> bool:
    return name in _NAMES or any(pattern.fullmatch(name) for pattern in _PATTERNS)


def _may_name(name: str) -> bool:
    """Whether a file may travel for being named: no weights, code, adapter or hidden file."""
    hidden = name.startswith(".") or "/." in name
    return (
        not hidden and name != ADAPTER_CONFIG and not re.fullmatch(f"(?i){_WEIGHTS_AND_CODE}", name)
    )


def _is_module(name: str) -> bool:
    return "/" not in name and name.endswith(".py") and not name.startswith(".")


def _strings(value: Any) -> Iterator[str]:
    """Every string among the values of a JSON object, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _modules(*configs: Mapping[str, Any]) -> list[str]:
    """List the Python files that `auto_map` names; those of other repositories (`--`) left out."""
    classes = [name for config in configs for name in _strings(config.get("auto_map"))]
    return [f"{name.partition('.')[0]}.py" for name in classes if "--" not in name]


_RELATIVE_IMPORT = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", re.MULTILINE)
"""What transformers looks for (`get_relative_imports`) to know which files a module needs."""


def _with_imports(
    modules: Collection[str], names: Collection[str], read: Callable[[str], str]
) -> set[str]:
    """Python files with those that they import from beside them; only what is there."""
    found, left = set(), [name for name in modules if name in names and _is_module(name)]
    while left:
        name = left.pop()
        found.add(name)
        beside = [f"{a or b}.py" for a, b in _RELATIVE_IMPORT.findall(read(name))]
        left += [other for other in beside if other in names and other not in found]
    return found
