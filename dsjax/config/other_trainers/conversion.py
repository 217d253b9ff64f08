# SPDX-License-Identifier: Apache-2.0
"""A file of another trainer, whole -> a file of ours that trains the same.

In: the YAML of LLaMA-Factory or of TRL, the number of devices, and dataset_info.json. Out: the text
of our YAML, headed by what is not the same and by the keys that set nothing; or one `ConfigError`
with every reason why not. Not done here: opening the checkpoint or the data.
"""

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.config import rules
from dsjax.config.json_file import read_object
from dsjax.config.load import RunConfig, make_config
from dsjax.config.other_trainers import TRAINERS, llama_factory, trainer_of, trl
from dsjax.config.other_trainers.datasets import Registry
from dsjax.config.other_trainers.draft import Draft, begin
from dsjax.config.yaml_file import read_yaml, to_text
from dsjax.errors import ConfigError, printable, raise_all

INFO = "dataset_info.json"


class Conversion(NamedTuple):
    """A file of ours.

    Attributes:
        trainer: the name of the other one.
        tree: section -> key -> value.
        differs: lines about what is not the same.
        nothing: lines about keys that set nothing.
    """

    trainer: str
    tree: dict[str, Any]
    differs: list[str]
    nothing: list[str]


def convert_file(path: str, devices: int | None, dataset_info: str | None) -> Conversion:
    """Convert a file.

    Args:
        path: the YAML of LLaMA-Factory or TRL.
        devices: how many it was for.
        dataset_info: LLaMA-Factory's dataset_info.json; None: the one in the file's `dataset_dir`.

    Raises:
        ConfigError: names every key that is unknown, or asks for what is not here.
    """
    tree = read_yaml(path)
    trainer = trainer_of(tree)
    if trainer is None:
        names = " or ".join(one.name for one in TRAINERS)
        got = ", ".join(printable(str(key)) for key in tree)
        raise ConfigError(
            f"{path}: got the keys {got}, expected those of {names}; name the data as it does "
            "(dataset, dataset_name)"
        )
    draft = begin(tree, trainer)
    if trainer.name == "TRL":
        trl.convert(draft, devices)
    else:
        llama_factory.convert(draft, devices, read_registry(draft, dataset_info))
    raise_all(dict.fromkeys(draft.problems))
    draft.tell_the_rest()
    _check(draft)
    return Conversion(trainer.name, nested(draft.ours), draft.differs, draft.nothing)


def read_registry(draft: Draft, dataset_info: str | None) -> Registry | None:
    """Read what the names of data sets mean; None if nothing says it.

    Raises:
        ConfigError: there is no such file, or it is no JSON object.
    """
    folder = str(draft.values["dataset_dir"])
    if dataset_info is None and folder == "ONLINE":
        return Registry("the hub", "", None)
    file = Path(dataset_info if dataset_info is not None else os.path.join(folder, INFO))
    if file.is_file():
        return Registry(str(file), str(file.parent), read_object(file, "--dataset-info"))
    if dataset_info is not None:
        raise ConfigError(f"--dataset-info: got {file}, which is no file, expected a {INFO}")
    return None


def _check(draft: Draft) -> None:
    """Have our rules read the result; a refusal names the key of theirs as well."""
    try:
        make_config(nested(draft.ours))
    except ConfigError as error:
        lines = str(error).splitlines()
    else:
        return
    sources = [draft.source.get(line.partition(":")[0]) for line in lines]
    raise ConfigError(
        "\n".join(
            f"{source}: here {line}" if source and not line.startswith(f"{source}:") else line
            for source, line in zip(sources, lines, strict=True)
        )
    )


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into sections, in the order in which `--help` lists them."""
    order = [
        f"{section}.{key}" if key else section
        for section, keys in rules.keys(RunConfig).items()
        for key in keys or [""]
    ]
    tree: dict[str, Any] = {}
    for path in sorted(dotted, key=order.index):
        section, dot, key = path.partition(".")
        if dot:
            tree.setdefault(section, {})[key] = dotted[path]
        else:
            tree[section] = dotted[path]
    return tree


def as_text(conversion: Conversion, path: str, devices: int | None) -> str:
    """Write our file: what became of the keys without a counterpart, then the sections."""
    head = [f"Converted from {printable(path)} ({conversion.trainer}), devices: {devices}."]
    for title, lines in (
        ("Not the same here:", conversion.differs),
        ("Nothing to set here:", conversion.nothing),
    ):
        if lines:
            head += [title, *(f"  {line}" for line in lines)]
    return "".join(f"# {line}\n" for line in head) + to_text(conversion.tree)
