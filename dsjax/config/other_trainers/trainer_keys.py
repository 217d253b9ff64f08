# SPDX-License-Identifier: Apache-2.0
"""The keys of transformers' `TrainingArguments`, which LLaMA-Factory and TRL both take, and ours.

In: nothing; this is data. Out: for each key the dotted key of ours and how its value changes, or
why there is none; their defaults. Read in transformers 4 and 5. Not done here: reading values
(`trainer`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dsjax.config.other_trainers.key import Key, differs, each, nothing, read, refused, same

_BATCH = (
    "rows over all devices: per_device_train_batch_size x gradient_accumulation_steps x devices"
)
MEMORY = "less memory and the same numbers; full: every layer is computed again"
_MESH = "mesh.fsdp: -1, the default, shards weights and optimizer state as ZeRO-3 does"
KERNELS = "kernels are chosen for the device (model.attention: auto)"
WORKERS = "reading and tokenising rows has no settings"
CODE = "no code of a checkpoint or data set is run: its model type is built in"
_HUB = "the export is uploaded once it is proven, with the token of huggingface_hub"
TRACKER = "a tracker's own setting"
_EVAL = "the loss of an evaluation does not depend on it"
TORCH = "a matter of PyTorch"

KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "output_dir": same("output_dir"),
        "num_train_epochs": same("training.num_train_epochs"),
        "max_steps": read("training.max_steps", "-1 is null"),
        "per_device_train_batch_size": read("training.batch_size", _BATCH),
        "gradient_accumulation_steps": read(
            "training.gradient_accumulation_steps", "microbatches of training.batch_size"
        ),
        "seed": same("training.seed"),
        "learning_rate": same("optimizer.learning_rate"),
        "weight_decay": same("optimizer.weight_decay"),
        "adam_beta1": same("optimizer.adam_beta1"),
        "adam_beta2": same("optimizer.adam_beta2"),
        "adam_epsilon": same("optimizer.adam_epsilon"),
        "max_grad_norm": same("optimizer.max_grad_norm"),
        "lr_scheduler_type": read("optimizer.lr_scheduler_type", "linear is their default"),
        "lr_scheduler_kwargs": read(
            "optimizer.min_lr_ratio, optimizer.num_cycles",
            "min_lr / learning_rate, min_lr_rate, num_cycles",
        ),
        "warmup_ratio": read("optimizer.warmup_ratio", "0 is their default; constant has none"),
        "warmup_steps": read("optimizer.warmup_steps", "below 1 it is optimizer.warmup_ratio"),
        "optim": read("optimizer.optim", "adamw_torch and its like: adamw; lion_32bit: lion"),
        "bf16": read("model.dtype", "true: bfloat16"),
        "fp16": read("model.dtype", "true: float16"),
        "gradient_checkpointing": read("training.gradient_checkpointing", MEMORY),
        "activation_checkpointing": read("training.gradient_checkpointing", MEMORY),
        "train_sampling_strategy": read("data.shuffle", "sequential: false"),
        **each(
            "eval_strategy evaluation_strategy",
            read("training.eval_steps", "steps: eval_steps, or else logging_steps; no: at the end"),
        ),
        "eval_steps": read("training.eval_steps", "with eval_strategy: steps"),
        "save_steps": read("checkpoint.save_steps", "a share of the steps is refused"),
        "save_total_limit": same("checkpoint.save_total_limit"),
        "logging_steps": read("logging.logging_steps", "a share of the steps is refused"),
        "report_to": read("logging.report_to", "none: []; all: what is there"),
        "push_to_hub": read("export.push_to_hub", "true: the repository of hub_model_id"),
        "hub_model_id": read("export.push_to_hub", "with push_to_hub: true"),
        "hub_private_repo": read("export.hub_private_repo", "private is the default here"),
        # The same here, or of no consequence.
        **each("do_eval", nothing("evaluations follow data.eval and data.val_size")),
        **each("overwrite_output_dir", nothing("a run goes on in its folder; --fresh: a new one")),
        "resume_from_checkpoint": differs(
            "the same command again resumes; a checkpoint of theirs is not read"
        ),
        **each(
            "per_device_eval_batch_size eval_accumulation_steps prediction_loss_only",
            nothing(_EVAL),
        ),
        **each("gradient_checkpointing_kwargs activation_checkpointing_kwargs", nothing(MEMORY)),
        **each("tf32 torch_empty_cache_steps use_cache ddp_timeout ddp_backend", nothing(TORCH)),
        **each(
            "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers", nothing(TORCH)
        ),
        **each("torch_compile torch_compile_backend torch_compile_mode", nothing("XLA compiles")),
        **each("use_liger_kernel liger_kernel_config", nothing(KERNELS)),
        **each("deepspeed fsdp fsdp_config", nothing(_MESH)),
        **each("dataloader_num_workers dataloader_prefetch_factor", nothing(WORKERS)),
        **each("dataloader_pin_memory dataloader_persistent_workers", nothing(WORKERS)),
        **each("group_by_length length_column_name", nothing("only the order of rows, drawn here")),
        **each("data_seed", nothing("training.seed draws the order, by another generator")),
        **each("logging_dir", nothing("TensorBoard's files lie in output_dir")),
        **each(
            "logging_first_step logging_strategy log_level", nothing("see logging.logging_steps")
        ),
        **each(
            "include_num_input_tokens_seen include_tokens_per_second",
            nothing("tokens are always logged"),
        ),
        **each("disable_tqdm", nothing("the bar is not drawn where there is no terminal")),
        **each("run_name project trackio_space_id", nothing(TRACKER)),
        **each("hub_strategy hub_token", nothing(_HUB)),
        **each("remove_unused_columns label_names", nothing("columns are told by data.format")),
        **each("save_safetensors", nothing("always safetensors")),
        **each("save_only_model", nothing("checkpoints hold what a run needs to go on")),
        **each("bf16_full_eval fp16_full_eval", nothing("evaluations compute in model.dtype")),
        # Not the same: said in the file.
        "save_strategy": differs("checkpoints come every checkpoint.save_steps steps"),
        "eval_delay": differs("evaluations come from the first training.eval_steps on"),
        "eval_on_start": differs("no evaluation before the first step"),
        "load_best_model_at_end": differs("the last state is exported, whatever eval_loss was"),
        **each("metric_for_best_model greater_is_better", differs("no best state is looked for")),
        "dataloader_drop_last": differs("no row is dropped at the end of an epoch"),
        # What would change the weights that come out.
        "do_train": refused("a file that does not train is for `dsjax evaluate` or generate", True),
        "do_predict": refused("`dsjax generate` writes answers"),
        "predict_with_generate": refused("`dsjax generate` writes answers"),
        "label_smoothing_factor": refused("the loss is plain cross-entropy"),
        "neftune_noise_alpha": refused("no noise is added to embeddings"),
        "average_tokens_across_devices": refused("a step is the mean over all its tokens", True),
        "auto_find_batch_size": refused("`dsjax plan` says what fits; write a batch size"),
        "optim_args": refused("set optimizer.* keys"),
        "optim_target_modules": refused("GaLore and APOLLO are not here"),
        "use_cpu": refused("the devices are those that jax finds"),
    }
)
"""Keys of transformers' `TrainingArguments`, which both trainers take."""

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 500,
        "save_steps": 500,
        "save_total_limit": None,
        "seed": 42,
    }
)
"""Defaults that are written down, so that a converted file trains the same."""
