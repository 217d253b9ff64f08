# SPDX-License-Identifier: Apache-2.0
"""The sections of a configuration file: each key with its type, default and meaning.

In: values from YAML. Out: frozen sections that refuse what no key accepts. Key names are those of
Hugging Face's `TrainingArguments` and PEFT's configs wherever they have one. A section's
`model_fields_set` holds the keys that the user gave. Not done here: comparing keys (`load`).
"""

import os.path
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _as_list(value: object) -> object:
    """Take one value where a list of values is expected."""
    return [value] if isinstance(value, (str, int)) else value


def _no_number(value: object) -> object:
    """Take no 1 for true, which equals it."""
    return str(value) if type(value) in (int, float) else value


Positive = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=1, le=2**16)]
LoraStart = Annotated[
    Literal[True, "gaussian", "pissa", "olora"]
    | Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]?$", examples=["pissa_niter_4"])],
    BeforeValidator(_no_number),
]
Scale = Annotated[int, Field(gt=0, le=10**9)] | Annotated[float, Field(gt=0, le=10**9)]
FolderPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
AxisSize = Literal[-1] | Positive
Indices = list[Annotated[int, Field(ge=0)]]
Layers = Annotated[
    Indices, BeforeValidator(_as_list, json_schema_input_type=Annotated[int, Field(ge=0)] | Indices)
]
Texts = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Sources = Annotated[Texts, Field(min_length=1)]
Reporters = Annotated[
    list[Literal["tensorboard", "wandb", "trackio", "swanlab"]], BeforeValidator(_as_list)
]


Quantization = Literal["nf4", "int8", "fp8"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelSection(Section):
    """Which checkpoint to start from, and in which precision to compute."""

    path: FolderPath
    """Hugging Face checkpoint: a directory, a URL of one (gs://, s3://, hf://), or the id of a
    repository on the hub, also of ModelScope (modelscope://organization/name); or a directory
    written by `convert_weights.py to-flax`."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; null: its default branch."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Number type of the computation. float16 scales its loss dynamically."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Number type in which trained base weights are held and updated (full training); null:
    float32. bfloat16 rounds updates at random, so that none is lost on average. Frozen weights are
    held in `dtype`, adapters in float32."""
    quantization: Quantization | None = None
    """How an adapter's frozen weights are held: nf4 (4.5 bits a weight), int8 (8 bits) or, of an
    FP8 checkpoint, fp8 (its own bytes), decoded where they are used; null: as numbers of `dtype`.
    Embedding, norms, routers and head stay."""
    quantization_double: bool = False
    """nf4: whether the scales of its blocks are quantized, too (4.13 bits a weight)."""
    quantization_experts: bool = True
    """Whether routed experts' weights are held so, too."""
    quantization_skip_modules: Texts = []
    """Modules whose weights stay as they are: whole components of their paths (down_proj,
    self_attn.o_proj, shared_experts)."""
    attention: Literal["auto"] = "auto"
    """Attention kernel; auto: the best one for the device."""


AdapterType = Literal["LORA", "IA3", "PREFIX_TUNING"]

UNMERGED: Mapping[str, str] = MappingProxyType({"PREFIX_TUNING": "a prefix has no merged form"})
"""adapter.peft_type -> why its weights cannot be merged into the model's."""


class AdapterSection(Section):
    """What is trained on top of the model. Keys are those of PEFT's configs."""

    peft_type: AdapterType | None = None
    """Kind of adapter; null: full training, or what the adapter at `path` is."""
    path: FolderPath | None = None
    """PEFT adapter to continue from: a directory, or a URL of one. It then decides everything
    about the adapter; a key given here must agree with it."""
    r: Rank = 16
    """LoRA: rank."""
    lora_alpha: Scale = 32
    """LoRA: the update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """LoRA: dropout on the adapter's input."""
    target_modules: str | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """LoRA, IA3: modules that get an adapter: all-linear, a list of names (q_proj) or ends of
    paths, or one regular expression for the whole path. all-linear leaves out the head, routers and
    routed experts; gate_proj in a list means the experts' too (not for IA3, which leaves them),
    mlp.gate_proj the dense layers'."""
    exclude_modules: str | Annotated[list[str], Field(min_length=1)] | None = None
    """LoRA: those of target_modules that get none, named in the same ways."""
    layers_to_transform: Layers | None = None
    """LoRA: indices of the layers that get an adapter; null: all."""
    rank_pattern: dict[str, Rank] = {}
    """LoRA: another r for modules whose path ends in, or matches, the key."""
    alpha_pattern: dict[str, Scale] = {}
    """LoRA: another lora_alpha, as with rank_pattern."""
    use_rslora: bool = False
    """LoRA: scale by lora_alpha / sqrt(r)."""
    use_dora: bool = False
    """LoRA: learn the length of each row of a weight apart from its direction (DoRA)."""
    init_lora_weights: LoraStart = True
    """LoRA: first values of A and B. true: A at random (kaiming), B zero; gaussian: A normal;
    pissa, pissa_niter_4 (approximate), olora: parts of the weight, which stays as it is."""
    loraplus_lr_ratio: Scale | None = None
    """LoRA: lora_B, and what DoRA adds, learn at optimizer.learning_rate times this (LoRA+)."""
    feedforward_modules: str | list[str] | None = None
    """IA3: those of target_modules whose input is scaled; the others' output is. null: the
    down_proj among them."""
    num_virtual_tokens: Rank = 20
    """Prefix-tuning: length of the learnt prefix."""


class DataSection(Section):
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


class ObjectiveSection(Section):
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


class OptimizerSection(Section):
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


class TrainingSection(Section):
    """How long, in how many microbatches, and which weights."""

    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; 0.5 is half a pass."""
    max_steps: Positive | None = None
    """Optimizer steps; when given, num_train_epochs is not used and the data repeats."""
    batch_size: Positive = 16
    """Rows per optimizer step, over all devices."""
    gradient_accumulation_steps: Positive | Literal["auto"] = "auto"
    """Microbatches that a batch is split into; the result is the same. auto: as few as leave
    2,048 tokens at most to each device at a time, or one longer row."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of order, dropout and new weights."""
    freeze: Texts = []
    """Full training: regular expressions for paths of weights that stay as they are."""
    gradient_checkpointing: Literal["auto", "none", "dots", "names", "full"] = "auto"
    """What the backward pass computes again instead of keeping: none: nothing; dots: all but
    matrix products; names: all but the named activations; full: every layer. auto: the first of
    them whose compiled step fits the device."""
    eval_steps: Positive | None = None
    """Steps between evaluations; null: one at the end."""


class MeshSection(Section):
    """How devices are laid out: their number is the product; one -1 takes what is left."""

    data: AxisSize = 1
    """Copies of the model, each with a part of the batch."""
    fsdp: AxisSize = -1
    """Shards of weights and optimizer state, each with a part of the batch."""
    tensor: AxisSize = 1
    """Shards of every matrix product."""
    expert: AxisSize = 1
    """Shards of the experts, each with a part of the batch."""
    sequence: AxisSize = 1
    """Shards of every row's tokens, for rows that are too long for a device; data.max_length is a
    multiple of twice as many."""


class CheckpointSection(Section):
    """When the state of a run is saved. The last state always is."""

    save_steps: Positive = 500
    """Steps between checkpoints."""
    save_total_limit: Positive | None = 3
    """Number of checkpoints kept; null: all."""


class LoggingSection(Section):
    """What is reported besides metrics.jsonl."""

    logging_steps: Positive | Literal["auto"] = "auto"
    """Steps between two lines of metrics; auto: 10, or a tenth of a run of less than 100 steps."""
    report_to: Reporters = ["tensorboard"]
    """Where metrics also go; []: nowhere. wandb, trackio and swanlab need their own packages."""
    profile_steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """[a, b]: trace steps a + 1 to b for TensorBoard's profiler and Perfetto; null: none."""


class ExportSection(Section):
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
    path: FolderPath | None = None
    """Directory to write; null: export/ in `output_dir`."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub, organization/name, to which the proven export is
    uploaded; null: none."""
    hub_private_repo: bool = True
    """Whether that repository is private; of one that is there already it is not changed."""
