# SPDX-License-Identifier: Apache-2.0
"""Every knob of a run: typed, documented, strict.

In: a YAML file and `section.key=value` overrides. Out: a frozen `RunConfig`, or one `ConfigError`
that names every wrong key. Key names are those of Hugging Face's `TrainingArguments` and PEFT's
configs wherever they have one. Not done here: anything that needs the checkpoint, the data or the
devices (whether a target module exists, whether the batch divides over the mesh).

A module of the package imports its own section only; entry points alone see `RunConfig`. Paths
are relative to the working directory. A section's `model_fields_set` holds the keys that the user
gave.
"""

import json
import os
import re
from collections.abc import Container, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError, model_validator

from dsjax.config import rules
from dsjax.config.moved import absolute, check_unmoved, settled, with_paths
from dsjax.config.other_trainers import TRAINERS, is_of_another, trainer_of
from dsjax.config.paths import is_url
from dsjax.config.sections import (
    UNMERGED,
    AdapterSection,
    AdapterType,
    CheckpointSection,
    DataSection,
    ExportSection,
    FolderPath,
    LoggingSection,
    MeshSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    Section,
    TrainingSection,
)
from dsjax.config.yaml_file import read_yaml, set_overrides, to_text
from dsjax.errors import ConfigError, raise_all


class RunConfig(Section):
    """All sections of a run."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    export: ExportSection = ExportSection()
    output_dir: FolderPath
    """Directory of the run; running again with the same one resumes."""

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        raise_all(_contradictions(self))
        return self


# Values that have a name but no code yet: refused by that name.
_PLANNED: dict[str, Container[Any]] = {
    "adapter.peft_type": ("ADALORA", "BOTTLENECK"),
}


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: YAML file; None, as `split_arguments` gives it, if the user named none.
        overrides: words `section.key=value`, values written as YAML.

    Raises:
        ConfigError: names every key that is unknown, missing, wrong or at odds with another.
    """
    if path is None:
        raise ConfigError("--config: got nothing, expected a YAML file; add --config FILE")
    if not Path(path).exists():
        raise ConfigError(
            f"{path}: got No such file or directory, expected a YAML file; {_recipe_like(path)}"
        )
    file = settled(read_yaml(path), Path(path))
    tree = set_overrides(file, overrides, rules.keys(RunConfig))
    try:
        return make_config(tree)
    except ConfigError as error:
        if not is_of_another(file):
            raise
        raise ConfigError(f"{_other_trainer(path, file)}\n{error}") from error


def load_run(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a run that is to be trained: `load_config`, for one place alone.

    Raises:
        ConfigError: also for a run's own configuration that names another place than it lies in.
    """
    config = load_config(path, overrides)
    if path is not None and not any(word.startswith("output_dir=") for word in overrides):
        check_unmoved(read_yaml(path), Path(path))
    return config


def make_config(tree: Mapping[str, Any]) -> RunConfig:
    """Make a run's configuration of what its file would hold.

    Args:
        tree: section -> key -> value. Paths, tuples and numpy's numbers are taken as well.

    Raises:
        ConfigError: names every key that is unknown, missing, wrong or at odds with another.
    """
    # A section that is left out, or left empty, still has its required keys checked by name.
    filled: dict[str, Any] = {name: {} for name in rules.sections(RunConfig)}
    filled |= {name: _plain(part) for name, part in tree.items() if part is not None}
    try:
        return RunConfig.model_validate(filled)
    except ValidationError as error:
        lines = rules.problems(error, filled, RunConfig, _PLANNED)
    raise ConfigError("\n".join(lines))


def _plain(value: Any) -> Any:
    """Return Python's own value for one that a file could not hold."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "shape", None) == () else value


def _other_trainer(path: str | Path, file: Mapping[str, Any]) -> str:
    """Say whose file it is, and how it becomes one of ours."""
    trainer = trainer_of(file)
    name = trainer.name if trainer else " or ".join(one.name for one in TRAINERS)
    return (
        f"{path}: got a file of {name}, expected sections such as `model:`; convert it: "
        f"dsjax convert-config {path} --devices N > ours.yaml"
    )


def recipes() -> Path:
    """Return the folder of the recipes that come with the package: `configs/` of the repository."""
    return Path(str(resources.files("dsjax.config") / "recipes"))


def _recipe_like(path: str | Path) -> str:
    """Say where the recipes are: the one of this name, or all of them."""
    file = recipes() / Path(path).name
    return f"the recipe of this name is {file}" if file.is_file() else f"recipes are in {recipes()}"


def _contradictions(config: RunConfig) -> list[str]:
    """Compare keys that are each right but cannot stand together."""
    problems = []
    training, mesh, adapter, export = config.training, config.mesh, config.adapter, config.export
    microbatches = training.gradient_accumulation_steps
    if microbatches != "auto" and training.batch_size % microbatches:
        problems.append(
            f"training.batch_size: got {training.batch_size}, expected a multiple of "
            f"training.gradient_accumulation_steps ({microbatches})"
        )
    if config.data.val_size is not None and config.data.eval is not None:
        problems.append(
            f"data.val_size: got {config.data.val_size} beside data.eval, expected one of the two"
        )
    if training.eval_steps and config.data.eval is None and config.data.val_size is None:
        problems.append(
            f"training.eval_steps: got {training.eval_steps} without data.eval, "
            "expected null; or name files in data.eval, or set data.val_size"
        )
    traced = config.logging.profile_steps
    if traced and traced[0] >= traced[1]:
        problems.append(
            f"logging.profile_steps: got {traced}, expected a first number below the second; "
            "[a, b] traces steps a + 1 to b"
        )
    free = [name for name in ("data", "fsdp", "tensor", "expert") if getattr(mesh, name) == -1]
    if len(free) > 1:
        both = " and ".join(f"mesh.{name}" for name in free)
        problems.append(f"{both}: got -1, expected -1 on one axis; give the others a size")
    problems += _push_problems(export)
    return (
        problems
        + _quantization_contradictions(config.model, adapter)
        + _schedule_contradictions(config.optimizer)
        + _adapter_contradictions(adapter, export)
    )


def _quantization_contradictions(model: ModelSection, adapter: AdapterSection) -> list[str]:
    """Compare how frozen weights are held with whether there are any, and with its other keys."""
    if model.quantization is None:
        return [
            f"model.{key}: got {json.dumps(getattr(model, key))} without model.quantization, "
            "expected nothing; set model.quantization, or leave it out"
            for key in ("quantization_double", "quantization_experts", "quantization_skip_modules")
            if key in model.model_fields_set
            and getattr(model, key) != ModelSection.model_fields[key].default
        ]
    if model.quantization_double and model.quantization != "nf4":
        return [
            f"model.quantization_double: got true with {model.quantization}, expected false; only "
            "nf4 has it"
        ]
    if adapter.peft_type is None and adapter.path is None:
        return [
            f"model.quantization: got {model.quantization} without an adapter, expected null; "
            "quantized weights do not train: set adapter.peft_type"
        ]
    return []


def _push_problems(section: ExportSection) -> list[str]:
    """Look at where an export is to be uploaded."""
    name, problems = section.push_to_hub, []
    if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        problems.append(
            f"export.push_to_hub: got {name!r}, expected organization/name, or null for nowhere; a "
            "repository of your own is your user name/name"
        )
    if name is not None and section.format is None:
        problems.append(
            f"export.push_to_hub: got {name!r} with export.format null, expected null; there is no "
            "export to upload"
        )
    return problems


def _schedule_contradictions(section: OptimizerSection) -> list[str]:
    """Compare the schedule with the keys that it has not, or cannot do without."""
    kind, given = section.lr_scheduler_type, section.model_fields_set
    problems = []
    if kind == "constant":
        problems += [
            f"optimizer.{key}: got {getattr(section, key)} with lr_scheduler_type constant, which "
            "has no warm-up, expected 0; use constant_with_warmup, or leave it out"
            for key in ("warmup_ratio", "warmup_steps")
            if key in given and getattr(section, key)
        ]
    if kind == "cosine_with_min_lr" and "min_lr_ratio" not in given:
        problems.append(
            "optimizer.min_lr_ratio: got nothing with lr_scheduler_type cosine_with_min_lr, "
            "expected the part of the peak at which it ends; write 0.1 for a tenth"
        )
    return problems


def _adapter_contradictions(adapter: AdapterSection, export: ExportSection) -> list[str]:
    """Compare the adapter's kind with its other keys and with the export's form."""
    problems = []
    none_named = adapter.peft_type is None and adapter.path is None
    unused = sorted(adapter.model_fields_set - {"peft_type", "path"})
    if none_named and unused and "peft_type" not in adapter.model_fields_set:
        problems.append(
            f"adapter.peft_type: got nothing beside adapter.{unused[0]}, expected "
            f"{', '.join(get_args(AdapterType))}, or null for full training"
        )
    if none_named and export.format == "peft":
        problems.append(
            'export.format: got "peft" without an adapter, expected merged or null; '
            "or set adapter.peft_type"
        )
    if adapter.peft_type is not None:
        try:
            export_format(export, adapter.peft_type)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def export_format(
    section: ExportSection, peft_type: str | None
) -> Literal["merged", "peft"] | None:
    """Decide what a run writes, once the kind of its adapter is known.

    Args:
        section: the user's wish, where `merged` may be the default.
        peft_type: what trained: also an adapter from disk, whose kind no config need name.

    Raises:
        ConfigError: the user asked for the merged form of a prefix.
    """
    if peft_type is None or peft_type not in UNMERGED or section.format != "merged":
        return section.format
    if "format" in section.model_fields_set:
        raise ConfigError(
            f'export.format: got "merged" with {peft_type}, expected peft or null; '
            f"{UNMERGED[peft_type]}"
        )
    return "peft"


def located(config: RunConfig) -> RunConfig:
    """Make the paths of model, adapter, data and output absolute, for a process in any folder.

    What is not there as a file or folder, so a hub's id or an address, stays as it is.
    """
    place = config.output_dir
    sections: dict[str, Any] = {"output_dir": place if is_url(place) else os.path.abspath(place)}
    for name, values in with_paths(config.model_dump(exclude_unset=True), absolute).items():
        section = getattr(config, name)
        if isinstance(section, Section):
            sections[name] = section.model_copy(update=values)
    return config.model_copy(update=sections)


def to_yaml(config: RunConfig) -> str:
    """Write the resolved configuration; reading it back gives the equal one.

    Where the adapter decides what the defaults are, or the schedule has no warm-up, only keys that
    the user gave are written: a default written down would read as the user's wish.
    """
    tree = config.model_dump()
    if config.adapter.path is not None:
        tree["adapter"] = config.adapter.model_dump(exclude_unset=True)
    if config.adapter.path is not None or config.adapter.peft_type in UNMERGED:
        tree["export"] = config.export.model_dump(exclude_unset=True)
    if config.optimizer.lr_scheduler_type == "constant":
        given = config.optimizer.model_fields_set
        tree["optimizer"] = {
            key: value
            for key, value in tree["optimizer"].items()
            if key in given or not key.startswith("warmup_")
        }
    return to_text(tree)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, for editors."""
    return RunConfig.model_json_schema()


def describe() -> str:
    """List every key with its rule, default and meaning: the text of `--help`."""
    return rules.describe(RunConfig)
