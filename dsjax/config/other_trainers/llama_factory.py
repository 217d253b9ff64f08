# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Factory's own keys: adapter, data, number types.

In: a draft of one of its files, and its dataset_info.json. Out: the draft with the keys of ours.
Not done here: what transformers' Trainer has too (`trainer`).
"""

from dsjax.config.other_trainers import trainer
from dsjax.config.other_trainers.datasets import Registry, convert_datasets, names_of
from dsjax.config.other_trainers.draft import Draft

_CUT = "a longer row is cut at its end, there in each turn by its share of the row"
_PACKED_LENGTH = "a packed row holds cutoff_len tokens, there one less"
_PACKED = "attention never crosses packed examples, there only with neat_packing"


def convert(draft: Draft, devices: int | None, registry: Registry | None) -> None:
    """Convert every key of a file."""
    as_text = _convert_stage(draft)
    if registry is None:
        draft.refuse(
            "dataset_dir",
            "a folder with dataset_info.json, which says what the data sets are",
            "give it with --dataset-info FILE",
        )
    elif not draft.values.get("dataset"):
        draft.refuse("dataset", f"names of data sets in {registry.file}", "write some")
    else:
        convert_datasets(draft, registry, as_text)
        draft.tell("dataset_dir", f"data sets are those of {registry.file}", same=True)
    _convert_rows(draft)
    _convert_adapter(draft)
    _convert_number_types(draft)
    trainer.convert(draft, devices, shuffles=not draft.on("disable_shuffling"))


def _convert_stage(draft: Draft) -> bool:
    """Convert what is optimised; return whether a row is one text, as in pre-training."""
    stage = draft.values["stage"]
    if stage not in ("sft", "pt"):
        draft.refuse("stage", "sft or pt", "other objectives are not here")
    elif stage == "pt" and draft.values.get("packing", True):
        draft.refuse(
            "stage",
            "packing: false beside pt",
            "documents that are cut into blocks of cutoff_len are not here: each is a row, or its "
            "beginning",
        )
    draft.set("stage", "objective.type", "sft")
    return stage == "pt"


def _convert_rows(draft: Draft) -> None:
    """Convert the length of rows, packing, and those that are held out."""
    draft.set("cutoff_len", "data.max_length", draft.values["cutoff_len"])
    if draft.values["stage"] != "pt":
        draft.tell("cutoff_len", _CUT)
    is_neat = draft.on("neat_packing")
    packs = draft.on("packing") or is_neat
    draft.set("packing", "data.packing", packs)
    if packs:
        draft.tell("neat_packing" if is_neat else "packing", _PACKED_LENGTH)
    if packs and not is_neat:
        draft.tell("packing", _PACKED)
    size = draft.values.get("val_size", 0)
    if not isinstance(size, int | float) or size < 0 or size == 1:
        draft.refuse("val_size", "a share below 1, or a number of rows above 1", "write one")
    elif size:
        draft.set("val_size", "data.val_size", int(size) if size > 1 else size)


def _convert_adapter(draft: Draft) -> None:
    """Convert what trains; an adapter from disk decides everything about itself."""
    kind = draft.values["finetuning_type"]
    paths = names_of(draft.values.get("adapter_name_or_path"))
    freely = "training.freeze takes patterns of weights that stay; start from finetuning_type: full"
    if kind not in ("lora", "full"):
        draft.refuse("finetuning_type", "lora or full", freely)
    elif kind == "full" or paths:
        given = [key for key in draft.given if key.startswith("lora_") or key == "use_rslora"]
        for key in given:
            draft.tell(key, "not used, there neither: see finetuning_type", same=True)
    if paths[1:] or (paths and kind == "full"):
        draft.refuse(
            "adapter_name_or_path", "one adapter, of finetuning_type lora", "merge it first"
        )
    elif paths:
        draft.set("adapter_name_or_path", "adapter.path", paths[0])
    elif kind == "lora":
        _convert_lora(draft)
    if kind == "lora":
        draft.set("finetuning_type", "export.format", "peft")
        ratio = draft.values.get("loraplus_lr_ratio")
        if ratio is not None:
            draft.set("loraplus_lr_ratio", "adapter.loraplus_lr_ratio", ratio)


def _convert_lora(draft: Draft) -> None:
    rank = draft.values["lora_rank"]
    draft.set("finetuning_type", "adapter.peft_type", "LORA")
    draft.set("lora_rank", "adapter.r", rank)
    twice = 2 * rank if isinstance(rank, int) else rank
    draft.set("lora_alpha", "adapter.lora_alpha", draft.values.get("lora_alpha") or twice)
    draft.set("lora_dropout", "adapter.lora_dropout", draft.values["lora_dropout"])
    for key in ("use_rslora", "use_dora"):
        if draft.on(key):
            draft.set(key, f"adapter.{key}", True)
    if draft.on("pissa_init"):
        niter = draft.values.get("pissa_iter", 16)
        start = "pissa" if niter == -1 else f"pissa_niter_{niter}"
        draft.set("pissa_init", "adapter.init_lora_weights", start)
    targets = names_of(draft.values["lora_target"])
    draft.set(
        "lora_target", "adapter.target_modules", targets if targets != ["all"] else "all-linear"
    )
    if targets == ["all"]:
        draft.tell("lora_target", trainer.EXPERTS)


def _convert_number_types(draft: Draft) -> None:
    """Convert number types: of the computation, of what is updated, of frozen weights."""
    trainer.convert_dtype(draft, neither="bfloat16")
    if draft.on("pure_bf16"):
        draft.set("pure_bf16", "model.dtype", "bfloat16")
        if draft.values["finetuning_type"] == "full":
            draft.set("pure_bf16", "model.param_dtype", "bfloat16")
    elif not draft.values.get("bf16") and not draft.values.get("fp16"):
        draft.tell("bf16", "the checkpoint's number type there, which for DeepSeek's is bfloat16")
    bits, kind = draft.values.get("quantization_bit"), draft.values.get("quantization_type", "nf4")
    if bits is not None and (bits, kind) not in ((4, "nf4"), (8, "nf4")):
        draft.refuse("quantization_bit", "4 (of quantization_type nf4) or 8", "take it out")
    elif bits is not None:
        draft.set("quantization_bit", "model.quantization", {4: "nf4", 8: "int8"}[bits])
        if bits == 4 and draft.values.get("double_quantization", True):
            draft.set("double_quantization", "model.quantization_double", True)
        draft.tell("quantization_bit", trainer.QUANTIZED_EXPERTS)
    for key in ("gradient_checkpointing", "activation_checkpointing"):
        if key in draft.given:
            draft.tell(key, "disable_gradient_checkpointing decides, there too", same=True)
    draft.set(
        "disable_gradient_checkpointing",
        "training.gradient_checkpointing",
        "none" if draft.on("disable_gradient_checkpointing") else "full",
    )
