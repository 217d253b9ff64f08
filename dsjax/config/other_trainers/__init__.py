# SPDX-License-Identifier: Apache-2.0
"""Configurations of other trainers: LLaMA-Factory's YAML and TRL's.

In: a tree of their keys. Out: a tree of ours that trains the same, with every key told of that has
no counterpart. The parts: `key` (what one key is here), `trainer_keys`, `llama_factory_keys` and
`trl_keys` (tables of them), `draft` and `trainer` (what both share), `llama_factory`, `datasets`
(its dataset_info.json), `trl`, `conversion` (a file, whole). Not done here: the command
(`config.convert_config`).
"""

from collections.abc import Iterable

from dsjax.config.other_trainers import llama_factory_keys, trl_keys
from dsjax.config.other_trainers.key import Trainer

TRAINERS = (
    Trainer("LLaMA-Factory", llama_factory_keys.KEYS, llama_factory_keys.DEFAULTS),
    Trainer("TRL", trl_keys.KEYS, trl_keys.DEFAULTS),
)


def trainer_of(given: Iterable[str]) -> Trainer | None:
    """Tell whose file it is by its keys: those that only one of the trainers has."""
    names = set(given)
    alone = [
        names & (one.keys.keys() - other.keys.keys()) for one, other in (TRAINERS, TRAINERS[::-1])
    ]
    if len(alone[0]) == len(alone[1]):
        return None
    return TRAINERS[len(alone[1]) > len(alone[0])]


def is_of_another(tree: Iterable[str]) -> bool:
    """Whether a whole file is one of theirs: they name the model at the top, without a section."""
    return "model_name_or_path" in set(tree)


def counterpart(name: str) -> str | None:
    """Say what stands here for a key of theirs; None for one that is not theirs."""
    key = next((one.keys[name] for one in TRAINERS if name in one.keys), None)
    if key is None:
        return None
    if not key.ours:
        return f"no key here: {key.note}"
    return f"here {key.ours} ({key.note})" if key.note else f"here {key.ours}"
