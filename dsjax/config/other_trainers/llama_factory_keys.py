# SPDX-License-Identifier: Apache-2.0
"""The keys that LLaMA-Factory adds to transformers' `TrainingArguments`, and ours.

In: nothing; this is data. Out: for each key the dotted key of ours and how its value changes, or
why there is none; its defaults. Read in its `hparams` and `examples`. Not done here: reading values
(`llama_factory`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dsjax.config.other_trainers import trainer_keys
from dsjax.config.other_trainers.key import Key, differs, each, nothing, read, refused, same
from dsjax.config.other_trainers.trainer_keys import CODE, KERNELS, MEMORY, TRACKER, WORKERS

_LORA_ONLY = "of LoRA"
_INFO = "names in dataset_info.json (--dataset-info FILE) become files, format and column_mapping"
_TEXT_ONLY = "only text is trained on"
_GENERATION = "for generating, not for training"
_PREFERENCES = "only other stages read it"
_HABANA = "a matter of Habana's devices"
_KT = "KTransformers is a backend of PyTorch"

KEYS: Mapping[str, Key] = MappingProxyType(
    {
        **trainer_keys.KEYS,
        "model_name_or_path": same("model.path"),
        "model_revision": same("model.revision"),
        "adapter_name_or_path": read("adapter.path", "one; it decides about the adapter"),
        "stage": read("objective.type", "sft; pt with packing: false is data.format: text"),
        "finetuning_type": read("adapter.peft_type", "lora: LORA; full: null"),
        "lora_rank": read("adapter.r", _LORA_ONLY),
        "lora_alpha": read("adapter.lora_alpha", "their default is 2 x lora_rank"),
        "lora_dropout": read("adapter.lora_dropout", _LORA_ONLY),
        "lora_target": read("adapter.target_modules", "all: all-linear; names with commas: a list"),
        "use_rslora": read("adapter.use_rslora", _LORA_ONLY),
        "use_dora": read("adapter.use_dora", _LORA_ONLY),
        "pissa_init": read("adapter.init_lora_weights", "pissa_niter_ and pissa_iter"),
        "pissa_iter": read("adapter.init_lora_weights", "16 is their default; -1: pissa"),
        "loraplus_lr_ratio": read("adapter.loraplus_lr_ratio", _LORA_ONLY),
        "pure_bf16": read("model.param_dtype", "full training: bfloat16, rounded at random"),
        "quantization_bit": read("model.quantization", "4: nf4; 8: int8"),
        "quantization_type": read("model.quantization", "nf4"),
        "double_quantization": read("model.quantization_double", "true is their default"),
        "disable_gradient_checkpointing": read("training.gradient_checkpointing", MEMORY),
        "dataset": read("data.train", _INFO),
        "eval_dataset": read("data.eval", _INFO),
        "dataset_dir": read("data.train", "the folder of dataset_info.json; ONLINE: hub data sets"),
        "cutoff_len": read("data.max_length", "2048 is the default of both"),
        "packing": read("data.packing", "false is their default"),
        "neat_packing": read("data.packing", "here attention never crosses packed examples"),
        "val_size": read("data.val_size", "a share, or above 1 a number"),
        "disable_shuffling": read("data.shuffle", "true: false"),
        # The same here, or of no consequence.
        **each("trust_remote_code", nothing(CODE)),
        "pissa_convert": nothing("an export is a plain LoRA of twice the rank in any case"),
        "loraplus_lr_embedding": nothing("no adapter is on an embedding"),
        **each(
            "overwrite_cache preprocessing_num_workers preprocessing_batch_size", nothing(WORKERS)
        ),
        **each("data_shared_file_system buffer_size streaming", nothing(WORKERS)),
        **each("tokenized_path", nothing("rows are tokenised when a run starts")),
        **each(
            "cache_dir hf_hub_token ms_hub_token om_hub_token", nothing("set HF_HOME and HF_TOKEN")
        ),
        **each("plot_loss", nothing("training_loss.png is always drawn")),
        **each(
            "include_effective_tokens_per_second compute_accuracy",
            nothing("both are always logged"),
        ),
        **each("flash_attn attn enable_liger_kernel use_unsloth use_v1_kernels", nothing(KERNELS)),
        **each("use_unsloth_gc use_reentrant_gc low_cpu_mem_usage offload_folder", nothing(MEMORY)),
        **each("use_fast_tokenizer", nothing("the fast tokenizer is used")),
        **each("ignore_pad_token_for_loss", nothing("padding is never trained")),
        **each("upcast_layernorm upcast_lmhead_output", nothing("norms and logits are in float32")),
        **each("print_param_status", nothing("the announcement counts what trains")),
        **each(
            "ray_run_name ray_storage_path ray_num_workers", nothing("see --devices and launch/")
        ),
        **each("resources_per_worker placement_strategy ray_init_kwargs", nothing("see launch/")),
        **each("use_kt kt_optimize_rule cpu_infer chunk_size", nothing(_KT)),
        **each("freeze_vision_tower freeze_multi_modal_projector media_dir", nothing(_TEXT_ONLY)),
        **each(
            "image_max_pixels image_min_pixels video_max_pixels video_maxlen", nothing(_TEXT_ONLY)
        ),
        **each(
            "export_dir export_size export_device export_legacy_format", nothing("see export.*")
        ),
        **each(
            "infer_backend infer_dtype max_new_tokens temperature top_p top_k",
            nothing(_GENERATION),
        ),
        **each("do_sample repetition_penalty eval_num_beams use_kv_cache", nothing(_GENERATION)),
        **each("use_swanlab swanlab_project swanlab_run_name swanlab_mode", nothing(TRACKER)),
        **each("pref_beta pref_loss pref_ftx simpo_gamma ref_model", nothing(_PREFERENCES)),
        **each("kto_chosen_weight kto_rejected_weight reward_model", nothing(_PREFERENCES)),
        **each("reward_model_type ppo_score_norm", nothing(_PREFERENCES)),
        **each("use_habana use_lazy_mode gaudi_config_name", nothing(_HABANA)),
        **each("throughput_warmup_steps use_hpu_graphs_for_training", nothing(_HABANA)),
        **each("use_hpu_graphs_for_inference", nothing(_HABANA)),
        # Not the same: said in the file.
        "template": differs("the checkpoint's own chat template is used: compare them"),
        **each(
            "tool_format enable_thinking", differs("the checkpoint's own chat template decides")
        ),
        "max_samples": differs("all rows are read; cut the files yourself"),
        "eval_on_each_dataset": differs("one evaluation over all rows of data.eval"),
        # What would change the weights that come out.
        "default_system": refused("write `system` into the rows"),
        "train_on_prompt": refused("give the messages a loss_weight of 1"),
        "mask_history": refused("give the earlier answers a loss_weight of 0"),
        "mix_strategy": refused("data sets are put behind one another", "concat"),
        "interleave_probs": refused("data sets are put behind one another"),
        "additional_target": refused("beside LoRA nothing else trains"),
        "create_new_adapter": refused("merge the adapter first (`dsjax export`)"),
        **each(
            "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules",
            refused("training.freeze takes patterns of weights that stay"),
        ),
        **each(
            "use_galore use_apollo use_badam use_adam_mini use_muon",
            refused("see optimizer.optim"),
        ),
        **each("use_llama_pro mixture_of_depths shift_attn", refused("the model stays as it is")),
        "rope_scaling": refused("write it into the checkpoint's config.json"),
        **each(
            "resize_vocab add_tokens add_special_tokens", refused("the vocabulary stays as it is")
        ),
        "split_special_tokens": refused("special tokens are read as such"),
        "moe_aux_loss_coef": refused("objective.aux_loss_alpha is DeepSeek's own balance loss"),
        "train_from_scratch": refused("a checkpoint is trained on"),
        **each("use_dft_loss use_eaft_loss", refused("the loss is plain cross-entropy")),
        "fp8": refused("matrix products are in model.dtype"),
        "use_mca": refused("Megatron is not here; see mesh.*"),
        **each("task lang n_shot save_dir batch_size", refused("a benchmark is no training run")),
        "sequence_parallel_size": refused(
            "see mesh.sequence; training.batch_size counts rows over all devices", 1
        ),
        "early_stopping_steps": refused("a run ends at its last step"),
    }
)
"""Keys that LLaMA-Factory adds."""

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **trainer_keys.DEFAULTS,
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "cutoff_len": 2048,
        "dataset_dir": "data",
    }
)
"""Defaults that are written down, so that a converted file trains the same."""
