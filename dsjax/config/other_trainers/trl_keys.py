# SPDX-License-Identifier: Apache-2.0
"""The keys that TRL's SFT adds to transformers' `TrainingArguments`, and ours.

In: nothing; this is data. Out: for each key the dotted key of ours and how its value changes, or
why there is none; its defaults. Read in its `SFTConfig`, `ModelConfig` and `scripts`. Not done
here: reading values (`trl`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dsjax.config.other_trainers import trainer_keys
from dsjax.config.other_trainers.key import Key, each, nothing, read, refused, same
from dsjax.config.other_trainers.trainer_keys import CODE, KERNELS, MEMORY, TORCH, WORKERS

_PEFT_ONLY = "of LoRA"

KEYS: Mapping[str, Key] = MappingProxyType(
    {
        **trainer_keys.KEYS,
        "model_name_or_path": same("model.path"),
        "model_revision": same("model.revision"),
        **each(
            "dtype torch_dtype",
            read(
                "model.dtype, model.param_dtype",
                "of the computation; of what full training updates",
            ),
        ),
        "use_peft": read("adapter.peft_type", "true: LORA"),
        "lora_r": read("adapter.r", _PEFT_ONLY),
        "lora_alpha": read("adapter.lora_alpha", _PEFT_ONLY),
        "lora_dropout": read("adapter.lora_dropout", "0.05 is their default"),
        "lora_target_modules": read("adapter.target_modules", "PEFT's default: [q_proj, v_proj]"),
        "use_rslora": read("adapter.use_rslora", _PEFT_ONLY),
        "use_dora": read("adapter.use_dora", _PEFT_ONLY),
        "load_in_4bit": read("model.quantization", "nf4"),
        "load_in_8bit": read("model.quantization", "int8"),
        "bnb_4bit_quant_type": read("model.quantization", "nf4"),
        "use_bnb_nested_quant": read("model.quantization_double", "false is their default"),
        "dataset_name": read("data.train", "with an evaluation data.eval too"),
        "datasets": read("data.train", "path, or its data_files; one name and split for all"),
        "dataset_config": same("data.subset"),
        "dataset_train_split": read("data.split", "train is the default of both"),
        "dataset_test_split": read("data.split", "data.split holds for data.eval too"),
        "test_split_size": read("data.val_size", "a share or a number"),
        "dataset_text_field": read("data.column_mapping", "{text: the field}"),
        **each("max_length max_seq_length", read("data.max_length", "1024 is their default")),
        "packing": read("data.packing", "false is their default"),
        # The same here, or of no consequence.
        **each("trust_remote_code", nothing(CODE)),
        **each("attn_implementation use_flash_attention_2 padding_free", nothing(KERNELS)),
        **each("dataset_num_proc dataset_streaming streaming dataset_batch_size", nothing(WORKERS)),
        **each("eval_packing pad_to_multiple_of", nothing("padding changes no loss")),
        **each("activation_offloading gradient_checkpointing_use_reentrant", nothing(MEMORY)),
        **each("bnb_4bit_quant_storage", nothing("see model.quantization")),
        **each("shuffle_dataset", nothing("see data.shuffle")),
        **each("ignore_bias_buffers", nothing(TORCH)),
        **each("env", nothing("set environment variables before the command")),
        "assistant_only_loss": read("", "what the assistant says is trained, as with true"),
        # What would change the weights that come out.
        "completion_only_loss": refused("only completions are trained", True),
        "packing_strategy": refused("rows are packed whole, longer ones are cut", "bfd"),
        "loss_type": refused("the loss is plain cross-entropy", "nll", "chunked_nll"),
        "truncation_mode": refused("long rows are cut at their end", "keep_start"),
        "lora_task_type": refused("only causal models are trained", "CAUSAL_LM"),
        **each(
            "lora_modules_to_save lora_target_parameters", refused("beside LoRA nothing trains")
        ),
        "chat_template_path": refused("put the template into the checkpoint's folder"),
        **each(
            "eos_token pad_token", refused("the tokenizer's own are used: set them in its files")
        ),
        "model_init_kwargs": refused("the checkpoint's config.json decides"),
        "dataset_kwargs": refused("rows are read by data.format"),
    }
)
"""Keys that TRL's SFT adds."""

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **trainer_keys.DEFAULTS,
        "learning_rate": 2e-5,
        "logging_steps": 10,
        "max_length": 1024,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
)
"""Defaults that are written down, so that a converted file trains the same."""
