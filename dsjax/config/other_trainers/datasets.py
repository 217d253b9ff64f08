# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Factory's dataset_info.json: names of data sets -> files, format and columns.

In: the entries of that file, the folder that its paths start from, and the names that a
configuration has. Out: keys of the `data` section, or problems that name the entry. Not done here:
opening the data sets.
"""

import os.path
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsjax.config.other_trainers.draft import Draft, shown
from dsjax.errors import ConfigError, nearest

ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "tools": "tools",
}
"""Columns of the alpaca format: theirs -> ours."""
TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool", "function"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
"""Names inside a message that are read here."""
_OTHER_DATA = ("images", "videos", "audios", "chosen", "rejected", "kto_tag")
_OTHER_SOURCES = ("script_url", "cloud_file_name", "ms_hub_url", "om_hub_url")


class Registry(NamedTuple):
    """A dataset_info.json that has been read.

    Attributes:
        file: what messages call it.
        folder: where its file names start.
        entries: name -> description; None: names are data sets of the hub.
    """

    file: str
    folder: str
    entries: Mapping[str, Any] | None


def convert_datasets(draft: Draft, registry: Registry, as_text: bool) -> None:
    """Set the rows to train and to evaluate on.

    Args:
        draft: changed.
        registry: what the names mean.
        as_text: whether a row is one text (stage: pt).
    """
    formats: set[str] = set()
    hub: dict[str, set[Any]] = {"data.subset": set(), "data.split": set()}
    columns: dict[str, str] = {}
    unnamed: set[str] = set()
    for key, ours in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        paths = []
        for name in names_of(draft.values.get(key)):
            try:
                entry = _entry(registry, name)
                path, is_hub = _source(entry, name, registry)
                form, mapping = _columns(entry, name, as_text)
                _merge(columns, mapping, name)
            except ConfigError as error:
                draft.problems.append(f"{key}: {error}")
                continue
            paths.append(path)
            formats.add(form)
            unnamed |= _unnamed(entry, form)
            if entry.get("num_samples") is not None:
                draft.tell(key, f"num_samples of {name}: all rows are read; cut the file yourself")
            if is_hub:
                hub["data.subset"].add(entry.get("subset"))
                hub["data.split"].add(entry.get("split", "train"))
        if paths:
            draft.set(key, ours, paths)
    if unnamed:
        names = ", ".join(sorted(unnamed))
        draft.tell("dataset", f"{names}: read wherever a row has them, there only if described")
    _set_shared(draft, formats, hub, columns)


def names_of(value: Any) -> list[str]:
    """List names that are a list, or one text with commas."""
    if value is None:
        return []
    names = value if isinstance(value, list) else str(value).split(",")
    return [str(name).strip() for name in names]


def _entry(registry: Registry, name: str) -> Mapping[str, Any]:
    if registry.entries is None:
        return {"hf_hub_url": name}
    entry = registry.entries.get(name)
    if not isinstance(entry, dict):
        raise ConfigError(
            f"got {name!r}, expected a data set that {registry.file} describes; "
            f"{nearest(name, registry.entries)}"
        )
    for key in ("columns", "tags"):
        names = entry.get(key, {})
        if not isinstance(names, dict) or not all(map(_is_name, names.values())):
            raise ConfigError(f"got {name!r} with {key} {shown(names)}, expected names in it")
    for key in ("subset", "split"):
        if not _is_name(entry.get(key)):
            raise ConfigError(f"got {name!r} with {key} {shown(entry[key])}, expected a name")
    return entry


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _source(entry: Mapping[str, Any], name: str, registry: Registry) -> tuple[str, bool]:
    """Return the file, pattern or hub id of an entry, and whether it is one of the hub."""
    if entry.get("ranking"):
        raise ConfigError(f"got {name!r}, whose rows are preferences, expected answers to imitate")
    if entry.get("folder") is not None:
        raise ConfigError(f"got {name!r} with `folder`, expected files; download that folder first")
    if "hf_hub_url" in entry:
        return str(entry["hf_hub_url"]), True
    other = [key for key in _OTHER_SOURCES if key in entry]
    if other or "file_name" not in entry:
        raise ConfigError(
            f"got {name!r} with {other[0] if other else 'no source'}, expected hf_hub_url or "
            "file_name; download its files first"
        )
    path = os.path.join(registry.folder, str(entry["file_name"]))
    return (os.path.join(path, "*") if os.path.isdir(path) else path), False


def _columns(entry: Mapping[str, Any], name: str, as_text: bool) -> tuple[str, dict[str, str]]:
    """Return the format of an entry and the columns that have other names, ours: theirs."""
    columns = entry.get("columns", {})
    other = [key for key in _OTHER_DATA if columns.get(key) is not None]
    if other:
        raise ConfigError(f"got {name!r} with the column {other[0]}, expected text to imitate")
    formatting = entry.get("formatting", "alpaca")
    if as_text:
        column = columns.get("prompt", "instruction")
        return "text", {} if column == "text" else {"text": column}
    if formatting == "alpaca":
        mapping = {ours: columns[theirs] for theirs, ours in ALPACA.items() if columns.get(theirs)}
        return "alpaca", {ours: theirs for ours, theirs in mapping.items() if ours != theirs}
    if formatting not in ("sharegpt", "openai"):
        raise ConfigError(
            f"got {name!r} with formatting {shown(formatting)}, expected alpaca or sharegpt"
        )
    for tag, names in TAGS.items():
        value = entry.get("tags", {}).get(tag)
        if value is not None and value not in names:
            raise ConfigError(
                f"got {name!r} with {tag} {value!r}, expected {' or '.join(names)}; rename it in "
                "its rows"
            )
    column = columns.get("messages", "messages" if formatting == "openai" else "conversations")
    mapping = {ours: columns[ours] for ours in ("system", "tools") if columns.get(ours)}
    mapping = {ours: theirs for ours, theirs in mapping.items() if ours != theirs}
    if column == "messages":
        return "messages", mapping
    return "sharegpt", mapping | ({} if column == "conversations" else {"conversations": column})


def _unnamed(entry: Mapping[str, Any], form: str) -> set[str]:
    """List the columns that are read here, and there only if the entry names them."""
    if form == "text":
        return set()
    optional = ("query", "history", "system", "tools") if form == "alpaca" else ("system", "tools")
    named = entry.get("columns", {"query": "input"})
    return {ALPACA[key] for key in optional if named.get(key) is None}


def _merge(columns: dict[str, str], mapping: Mapping[str, str], name: str) -> None:
    """Add the columns of one data set to those of all."""
    for ours, theirs in mapping.items():
        if columns.setdefault(ours, theirs) != theirs:
            raise ConfigError(
                f"got {name!r}, whose {ours} is the column {theirs}, expected {columns[ours]} as "
                "in the data set before it; data.column_mapping holds for all: rename columns"
            )


def _set_shared(
    draft: Draft,
    formats: set[str],
    hub: Mapping[str, set[Any]],
    columns: Mapping[str, str],
) -> None:
    """Set the keys that hold for all data sets together."""
    if formats:
        draft.set("dataset", "data.format", formats.pop() if len(formats) == 1 else "auto")
    if columns:
        draft.set("dataset", "data.column_mapping", dict(columns))
    for ours, values in hub.items():
        if len(values) > 1:
            draft.problems.append(
                f"dataset: got {', '.join(sorted(map(str, values)))} for {ours} of its data sets "
                "on the hub, expected one for all; download the others and name their files"
            )
        # The split `train` is what null means for the rows to train on.
        elif values - {None, "train"} or ("data.eval" in draft.ours and values - {None}):
            draft.set("dataset", ours, next(iter(values)))
