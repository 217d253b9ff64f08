# SPDX-License-Identifier: Apache-2.0
"""What stays as long as a run does, and what may change from one start of it to the next.

In: a run's configuration, before and now, and digests of what it reads. Out: the keys that may not
differ; a name that all starts of a run share. The rule: what changes the numbers stays, what does
not is free. A key that is in no list stays. Not done here: making the digests (`setup`, `data`).
"""

from collections.abc import Mapping

from dsjax.config import RunConfig, rules
from dsjax.distributed.checksums import digest

FREE_SECTIONS = ("mesh", "checkpoint", "logging", "export")
"""How devices are laid out, what is saved, logged and written."""

FREE = (
    "output_dir",  # may have been moved
    "model.attention",  # like the mesh: the same sums in another order
    "data.eval",  # measures, and changes nothing
    "training.num_train_epochs",
    "training.max_steps",
    "training.gradient_accumulation_steps",  # the same sums in other microbatches
    "training.gradient_checkpointing",  # the same numbers, computed again or kept
    "training.eval_steps",
)
"""Keys that change no number of a step, or only the order in which it is summed."""

BY_CONTENT = (
    *("model.path", "model.revision"),
    "adapter.path",
    *("data.train", "data.split", "data.subset", "data.column_mapping", "data.val_size"),
    *("data.format", "data.overlong"),
)
"""Keys that say where something is read and how: what came of it is compared instead."""

LASTING_SECTIONS = ("adapter", "objective")
"""What is trained, and by which loss: all their keys but those above are compared."""

LASTING = (
    *("model.dtype", "model.param_dtype", "model.quantization"),
    *("model.quantization_double", "model.quantization_experts", "model.quantization_skip_modules"),
    *("data.max_length", "data.packing", "data.shuffle"),
    *("optimizer.optim", "optimizer.learning_rate", "optimizer.weight_decay"),
    *("optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_epsilon"),
    *("optimizer.max_grad_norm", "optimizer.lr_scheduler_type", "optimizer.num_cycles"),
    *("optimizer.warmup_ratio", "optimizer.warmup_steps", "optimizer.min_lr_ratio"),
    *("training.batch_size", "training.seed", "training.freeze"),
)
"""The other keys whose value is compared."""


def differing_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Name the keys that differ and may not between a run and its continuation."""
    before, after = old.model_dump(), new.model_dump()
    return [
        f"{section}.{key}"
        for section, key in _compared_keys()
        if before[section][key] != after[section][key]
    ]


def identity(config: RunConfig, contents: Mapping[str, str]) -> str:
    """Name a run: continuations have the same name, other runs another.

    Defaults are left out, so that a key that a later version adds changes no name.

    Args:
        config: the run's.
        contents: digests of what is read, by its key.
    """
    given = config.model_dump(mode="json", exclude_defaults=True)
    lasting = [
        (section, key, given[section][key])
        for section, key in _compared_keys()
        if key in given.get(section, {})
    ]
    return digest([lasting, dict(contents)])


def _compared_keys() -> list[tuple[str, str]]:
    """Return the section and name of each key whose value stays as it is as long as a run does."""
    return [
        (section, key)
        for section, inside in rules.keys(RunConfig).items()
        for key in inside
        if section not in FREE_SECTIONS and f"{section}.{key}" not in (*FREE, *BY_CONTENT)
    ]
