# SPDX-License-Identifier: Apache-2.0
"""TRL's own keys: adapter, data, number types.

In: a draft of a file for `trl sft`. Out: the draft with the keys of ours. Not done here: what
transformers' Trainer has too (`trainer`).
"""

from typing import Any

from dsjax.config.other_trainers import trainer
from dsjax.config.other_trainers.draft import Draft

_BUILDERS = ("json", "csv", "parquet", "text")
"""What `datasets.load_dataset` calls files on this machine."""
_LORA = {
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "lora_target_modules": "adapter.target_modules",
}
_WHOLE = (
    "of a conversation TRL trains every token, here what the assistant says: give the other "
    "messages a loss_weight of 1 to train them too"
)
_EVAL_SPLIT = "rows of the split validation are taken where the data set has one, there test"


def convert(draft: Draft, devices: int | None) -> None:
    """Convert every key of a file."""
    _convert_rows(draft)
    _convert_data(draft)
    _convert_adapter(draft)
    _convert_number_types(draft)
    trainer.convert(draft, devices, shuffles=True)


def _convert_rows(draft: Draft) -> None:
    """Convert the length of rows, packing, and what of a row trains."""
    key = "max_seq_length" if "max_seq_length" in draft.given else "max_length"
    if draft.values[key] is None:
        draft.refuse(key, "an integer", "write the length of the longest row in tokens")
    else:
        draft.set(key, "data.max_length", draft.values[key])
    draft.set("packing", "data.packing", draft.on("packing"))
    if draft.on("assistant_only_loss"):
        draft.tell("assistant_only_loss", "as here", same=True)
    else:
        draft.tell("assistant_only_loss", _WHOLE)
    column = draft.values.get("dataset_text_field", "text")
    if column != "text":
        draft.set("dataset_text_field", "data.column_mapping", {"text": column})


def _convert_data(draft: Draft) -> None:
    """Convert where rows come from."""
    if draft.values.get("datasets"):
        _convert_mixture(draft)
        return
    name = draft.values.get("dataset_name")
    if not name:
        draft.refuse("dataset_name", "a data set of the hub", "write one")
        return
    draft.set("dataset_name", "data.train", [name])
    split = draft.values.get("dataset_train_split", "train")
    tested = draft.values.get("dataset_test_split", "test")
    strategy = "evaluation_strategy" if "evaluation_strategy" in draft.given else "eval_strategy"
    if draft.values.get(strategy, "no") in ("no", False):
        if split != "train":
            draft.set("dataset_train_split", "data.split", split)
        return
    draft.set("dataset_name", "data.eval", [name])
    if (split, tested) != ("train", "test"):
        draft.refuse(
            "dataset_train_split" if split != "train" else "dataset_test_split",
            "the default beside an evaluation: data.split is one for data.train and data.eval",
            "write the splits to files",
        )
    draft.tell(strategy, _EVAL_SPLIT)


def _convert_mixture(draft: Draft) -> None:
    """Convert a list of data sets, which here share one subset and split."""
    entries = draft.values["datasets"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        draft.refuse("datasets", "a list of mappings with `path`", "write it so")
        return
    paths: list[str] = []
    shared = [(entry.get("name"), entry.get("split", "train")) for entry in entries]
    for entry in entries:
        if entry.get("data_dir") is not None or (entry.get("path") in _BUILDERS) != (
            "data_files" in entry
        ):
            draft.refuse("datasets", "a hub id in `path`, or files in `data_files`", "write it so")
            return
        paths += _files(entry["data_files"]) if "data_files" in entry else [str(entry.get("path"))]
        if entry.get("columns"):
            draft.tell("datasets", "columns are told by data.format", same=True)
    if shared != shared[:1] * len(shared):
        draft.refuse("datasets", "one name and split for all", "write the others to files")
        return
    draft.set("datasets", "data.train", paths)
    subset, split = shared[0]
    if subset is not None:
        draft.set("datasets", "data.subset", subset)
    if split != "train":
        draft.set("datasets", "data.split", split)
    if draft.values.get("test_split_size"):
        draft.set("test_split_size", "data.val_size", draft.values["test_split_size"])


def _files(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else [str(value)]


def _convert_adapter(draft: Draft) -> None:
    """Convert what trains; without use_peft the keys of LoRA are not used."""
    if not draft.on("use_peft"):
        for key in (*_LORA, "use_rslora", "use_dora"):
            if key in draft.given:
                draft.tell(key, "not used, there neither: see use_peft", same=True)
        return
    draft.set("use_peft", "adapter.peft_type", "LORA")
    draft.set("use_peft", "export.format", "peft")
    for key, ours in _LORA.items():
        draft.set(key, ours, draft.values[key])
    if draft.values["lora_target_modules"] == ["all-linear"]:
        draft.set("lora_target_modules", "adapter.target_modules", "all-linear")
        draft.tell("lora_target_modules", trainer.EXPERTS)
    for key in ("use_rslora", "use_dora"):
        if draft.on(key):
            draft.set(key, f"adapter.{key}", True)


def _convert_number_types(draft: Draft) -> None:
    """Convert number types: of the computation, of what is updated, of frozen weights."""
    key = "torch_dtype" if "torch_dtype" in draft.given else "dtype"
    dtype = draft.values.get(key, "float32")
    if "bf16" not in draft.given:  # TRL turns it on unless fp16 is
        draft.values["bf16"] = not draft.on("fp16")
    held = {"auto": "bfloat16", "bfloat16": "bfloat16", "float16": "float16"}
    trainer.convert_dtype(draft, neither=held.get(str(dtype), "float32"))
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        draft.refuse(key, "auto, bfloat16, float16 or float32", "write one of them")
    elif not draft.on("use_peft") and dtype == "float16":
        draft.refuse(key, "float32 or bfloat16 in full training", "write one of them")
    elif not draft.on("use_peft") and dtype != "float32":
        draft.set(key, "model.param_dtype", "bfloat16")
        if dtype == "auto":
            draft.tell(key, "the checkpoint's number type there, which for DeepSeek's is bfloat16")
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if draft.on(name)]
    if bits and draft.values.get("bnb_4bit_quant_type", "nf4") != "nf4":
        draft.refuse("bnb_4bit_quant_type", "nf4", "fp4 is not here")
    for name in bits:
        draft.set(name, "model.quantization", "nf4" if name == "load_in_4bit" else "int8")
        draft.tell(name, trainer.QUANTIZED_EXPERTS)
    if draft.on("load_in_4bit") and draft.on("use_bnb_nested_quant"):
        draft.set("use_bnb_nested_quant", "model.quantization_double", True)
    checkpointing = next(
        (
            name
            for name in ("activation_checkpointing", "gradient_checkpointing")
            if name in draft.given
        ),
        "gradient_checkpointing",
    )
    recomputes = checkpointing not in draft.given or draft.on(checkpointing)
    draft.set(checkpointing, "training.gradient_checkpointing", "full" if recomputes else "none")
