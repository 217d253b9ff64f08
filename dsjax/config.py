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

import os.path
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from dsjax import config_rules
from dsjax.config_yaml import read_yaml, set_overrides, to_text
from dsjax.config_yaml import split_arguments as split_arguments
from dsjax.errors import ConfigError, raise_all
from dsjax.storage import is_url, written_to_url


def _as_list(value: object) -> object:
    """Take one value where a list of values is expected."""
    return [value] if isinstance(value, (str, int)) else value


Positive = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=1, le=2**16)]
Scale = Annotated[int, Field(gt=0, le=10**9)] | Annotated[float, Field(gt=0, le=10**9)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
AxisSize = Literal[-1] | Positive
Indices = list[Annotated[int, Field(ge=0)]]
Layers = Annotated[
    Indices, BeforeValidator(_as_list, json_schema_input_type=Annotated[int, Field(ge=0)] | Indices)
]
Texts = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Sources = Annotated[Texts, Field(min_length=1)]
Reporters = Annotated[list[Literal["tensorboard"]], BeforeValidator(_as_list)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelSection(_Section):
    """Which checkpoint to start from, and in which precision to compute."""

    path: Folder
    """Hugging Face checkpoint: a directory, a URL of one (gs://, s3://, hf://), or the id of a
    repository on the hub; or a directory written by `convert_weights.py to-flax`."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; null: its default branch."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Number type of the computation. float16 scales its loss dynamically."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Number type in which trained base weights are held and updated (full training); null:
    float32. bfloat16 rounds updates at random, so that none is lost on average. Frozen weights are
    held in `dtype`, adapters in float32."""
    quantization: None = None
    """How frozen weights are stored; null: as numbers of `param_dtype`."""
    attention: Literal["auto"] = "auto"
    """Attention kernel; auto: the best one for the device."""


class AdapterSection(_Section):
    """What is trained on top of the model. Keys are those of PEFT's configs."""

    peft_type: Literal["LORA", "PREFIX_TUNING"] | None = None
    """Kind of adapter; null: full training, or what the adapter at `path` is."""
    path: Folder | None = None
    """PEFT adapter to continue from: a directory, or a URL of one. It then decides everything
    about the adapter; a key given here must agree with it."""
    r: Rank = 16
    """LoRA: rank."""
    lora_alpha: Scale = 32
    """LoRA: the update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """LoRA: dropout on the adapter's input."""
    target_modules: str | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """LoRA: modules that get an adapter: all-linear, a list of names (q_proj) or ends of paths,
    or one regular expression for the whole path. all-linear leaves out the head, routers and
    routed experts; gate_proj in a list means the experts' too, mlp.gate_proj the dense layers'."""
    layers_to_transform: Layers | None = None
    """LoRA: indices of the layers that get an adapter; null: all."""
    rank_pattern: dict[str, Rank] = {}
    """LoRA: another r for modules whose path ends in, or matches, the key."""
    alpha_pattern: dict[str, Scale] = {}
    """LoRA: another lora_alpha, as with rank_pattern."""
    use_rslora: bool = False
    """LoRA: scale by lora_alpha / sqrt(r)."""
    use_dora: Literal[False] = False
    """LoRA: learn magnitude and direction apart."""
    num_virtual_tokens: Rank = 20
    """Prefix-tuning: length of the learnt prefix."""


class DataSection(_Section):
    """What to train and evaluate on."""

    train: Sources
    """Files (JSON, JSONL, CSV, Parquet, text) or hub datasets to train on; one or a list. In paths
    *, ? and ** stand for what they match, in the order of the names."""
    eval: Sources | None = None
    """Files or hub datasets to evaluate on; null: no evaluation."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"
    ] = "auto"
    """What a row looks like; auto: each row's detected from its keys, and counted."""
    max_length: int = Field(default=2048, ge=2)
    """Length of a training row in tokens."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a longer row; all are counted and reported."""
    packing: bool = True
    """Fill a row with several examples; attention never crosses from one to another."""
    shuffle: bool = True
    """New order in every epoch; false: the order of the files."""
    column_mapping: dict[str, str] = {}
    """Names of columns, ours: theirs. {instruction: question, output: answer} reads the instruction
    from the column question. Files and hub datasets, also those of `eval`."""
    val_size: Positive | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Rows of `train`, as a number or a share, that are drawn by training.seed, not trained on, and
    evaluated on; instead of `eval`."""
    subset: str | None = None
    """Subset (configuration) of hub datasets; null: their default."""
    split: str | None = None
    """Split of hub datasets; null: train for `train`, and for `eval` validation, else test."""


class ObjectiveSection(_Section):
    """What is optimised."""

    type: Literal["sft"] = "sft"
    """sft: next-token cross-entropy on the trained part of each row."""
    aux_loss_alpha: float = Field(default=0.0, ge=0)
    """Models with experts: weight of the balance loss of the model's own kind, summed over its
    layers; 0: none. It is not in the loss that is logged."""
    bias_update_speed: float = Field(default=0.0, ge=0)
    """Full training of models whose router has e_score_correction_bias (V3): how far an expert's
    bias moves after each step, up if it took fewer of the batch's tokens than the mean, down if
    more; 0: biases stay as they are. V3's own training had 0.001."""
    mtp_loss_weight: float = Field(default=0.0, ge=0)
    """Full training of deepseek_v3 and deepseek_v32: weight of the loss of the token after the
    next, which the checkpoint's module for multi-token prediction predicts and which trains it;
    0: the module is kept as it is. V3's own training had 0.3, then 0.1. The loss is logged as
    mtp_loss, and is not in the loss."""


class OptimizerSection(_Section):
    """How weights are updated. Schedules equal Hugging Face's at every step."""

    optim: Literal["adamw", "lion"] = "adamw"
    """Update rule."""
    learning_rate: float = Field(default=2e-4, ge=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases have none."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(default=1e-8, ge=0)
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[float, Field(ge=0)] | None = 1.0
    """Gradients are scaled down to this global norm; 0 or null: they are not."""
    lr_scheduler_type: Literal[
        "cosine",
        "cosine_with_min_lr",
        "cosine_with_restarts",
        "linear",
        "constant",
        "constant_with_warmup",
    ] = "cosine"
    """Course of the learning rate after the warm-up; constant has none."""
    num_cycles: Positive = 1
    """Number of cosines of cosine_with_restarts."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Part of all steps in which the learning rate rises from 0; never all of them."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which it rises, fewer than all; when given, warmup_ratio is not used."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Part of the peak at which the learning rate ends; cosine_with_min_lr asks for it."""


class TrainingSection(_Section):
    """How long, in which portions, and which weights."""

    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; 0.5 is half a pass."""
    max_steps: Positive | None = None
    """Optimizer steps; when given, num_train_epochs is not used and the data repeats."""
    batch_size: Positive = 16
    """Rows per optimizer step, over all devices."""
    gradient_accumulation_steps: Positive | Literal["auto"] = 1
    """Portions in which a batch is computed; the result is the same. auto: as many as leave one row
    at a time to each device, whatever their number."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of order, dropout and new weights."""
    freeze: Texts = []
    """Full training: regular expressions for paths of weights that stay as they are."""
    gradient_checkpointing: Literal["none", "dots", "names", "full"] = "none"
    """What the backward pass computes again instead of keeping: none: nothing; dots: all but
    matrix products; names: all but the named activations; full: every layer."""
    eval_steps: Positive | None = None
    """Steps between evaluations; null: one at the end."""


class MeshSection(_Section):
    """How devices are laid out: their number is the product; one -1 takes what is left."""

    data: AxisSize = 1
    """Copies of the model, each with a part of the batch."""
    fsdp: AxisSize = -1
    """Shards of weights and optimizer state, each with a part of the batch."""
    tensor: AxisSize = 1
    """Shards of every matrix product."""
    expert: AxisSize = 1
    """Shards of the experts, each with a part of the batch."""
    sequence: Literal[1] = 1
    """Shards of the sequence."""


class CheckpointSection(_Section):
    """When the state of a run is saved. The last state always is."""

    save_steps: Positive = 500
    """Steps between checkpoints."""
    save_total_limit: Positive | None = 3
    """Number of checkpoints kept; null: all."""


class LoggingSection(_Section):
    """What is reported besides metrics.jsonl."""

    logging_steps: Positive = 10
    """Steps between two lines of metrics."""
    report_to: Reporters = ["tensorboard"]
    """Where metrics also go; []: nowhere."""
    profile_steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """[a, b]: trace steps a + 1 to b for TensorBoard's profiler and Perfetto; null: none."""


class ExportSection(_Section):
    """What is written at the end, in Hugging Face's formats."""

    format: Literal["merged", "peft"] | None = "merged"
    """merged: the whole model; peft: the adapter alone; null: nothing. A prefix has no merged
    form: its default is peft."""
    dtype: Literal["fp8"] | None = None
    """What changed tensors of an FP8 checkpoint are written as; fp8: new FP8 blocks; null:
    bfloat16. Unchanged ones keep their bytes."""
    min_kept: Annotated[float, Field(le=1)] | None = 0.9
    """merged: part of what training changed in the logits that the rounded weights must keep, else
    nothing is written; null: whatever they keep. It is printed, and stands in the model card."""
    path: Folder | None = None
    """Directory to write; null: export/ in `output_dir`."""


class RunConfig(_Section):
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
    output_dir: Folder
    """Directory of the run; running again with the same one resumes."""

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        raise_all(_contradictions(self))
        return self


# Values that have a name but no code yet: refused by that name.
_PLANNED: dict[str, Container[Any]] = {
    "model.quantization": ("int8", "nf4", "fp8"),
    "adapter.peft_type": ("BOTTLENECK",),
    "adapter.use_dora": (True,),
    "mesh.sequence": range(-1, 2**16),
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
    tree = set_overrides(read_yaml(path), overrides, config_rules.keys(RunConfig))
    # A section that is left out, or left empty, still has its required keys checked by name.
    filled = {name: {} for name in config_rules.sections(RunConfig)}
    filled |= {name: part for name, part in tree.items() if part is not None}
    try:
        return RunConfig.model_validate(filled)
    except ValidationError as error:
        lines = config_rules.problems(error, filled, RunConfig, _PLANNED)
    raise ConfigError("\n".join(lines))


def _contradictions(config: RunConfig) -> list[str]:
    """Compare keys that are each right but cannot stand together."""
    problems = []
    training, mesh, adapter, export = config.training, config.mesh, config.adapter, config.export
    portions = training.gradient_accumulation_steps
    if portions != "auto" and training.batch_size % portions:
        problems.append(
            f"training.batch_size: got {training.batch_size}, expected a multiple of "
            f"training.gradient_accumulation_steps ({portions})"
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
    written = {"output_dir": config.output_dir, "export.path": export.path}
    problems += [
        written_to_url(path, key) for key, path in written.items() if path and is_url(path)
    ]
    return (
        problems
        + _schedule_contradictions(config.optimizer)
        + _adapter_contradictions(adapter, export)
    )


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
            f"adapter.peft_type: got nothing beside adapter.{unused[0]}, expected LORA or "
            "PREFIX_TUNING, or null for full training"
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
    if peft_type != "PREFIX_TUNING" or section.format != "merged":
        return section.format
    if "format" in section.model_fields_set:
        raise ConfigError(
            'export.format: got "merged" with PREFIX_TUNING, expected peft or null; '
            "a prefix has no merged form"
        )
    return "peft"


def located(config: RunConfig) -> RunConfig:
    """The same configuration for a process in any folder: paths of model and adapter absolute.

    What is not there as a file or folder, so a hub's id or an address, stays as it is.
    """
    sections: dict[str, ModelSection | AdapterSection] = {}
    for name, section in (("model", config.model), ("adapter", config.adapter)):
        if section.path is not None and os.path.exists(section.path):
            absolute = {"path": os.path.abspath(section.path)}
            sections[name] = section.model_copy(update=absolute)
    return config.model_copy(update=sections)


def to_yaml(config: RunConfig) -> str:
    """Write the resolved configuration; reading it back gives the equal one.

    Where the adapter decides what the defaults are, or the schedule has no warm-up, only keys that
    the user gave are written: a default written down would read as the user's wish.
    """
    tree = config.model_dump()
    if config.adapter.path is not None:
        tree["adapter"] = config.adapter.model_dump(exclude_unset=True)
    if config.adapter.path is not None or config.adapter.peft_type == "PREFIX_TUNING":
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
    return config_rules.describe(RunConfig)
