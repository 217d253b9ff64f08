# SPDX-License-Identifier: Apache-2.0
"""What transformers' `TrainingArguments` mean here: batch, length, schedule, optimizer, precision.

In: a draft of either trainer. Out: the draft with those keys of ours. Semantics are those of
transformers 4 and 5. Not done here: model, adapter and data.
"""

from pydantic import ValidationError

from dsjax.config.other_trainers.draft import Draft, shown
from dsjax.config.sections import LoggingSection

EXPERTS = (
    "of a model with experts all-linear leaves the routed ones out; theirs takes them where they "
    "are modules: name gate_proj, up_proj and down_proj for them"
)

QUANTIZED_EXPERTS = (
    "routed experts are quantized, too, which bitsandbytes leaves as they are; "
    "model.quantization_experts=false does so"
)

_ADAMW = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_hf",
)
OPTIMIZERS = {**dict.fromkeys(_ADAMW, "adamw"), "lion_32bit": "lion"}
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "constant",
    "constant_with_warmup",
)


def convert(draft: Draft, devices: int | None, shuffles: bool) -> None:
    """Convert what `TrainingArguments` has, once the rows to evaluate on are known.

    Args:
        draft: changed.
        devices: that the file was for; None if nobody said.
        shuffles: whether an epoch has a new order by the trainer's other keys.
    """
    _convert_batch(draft, devices)
    _convert_steps(draft)
    _convert_schedule(draft)
    _convert_optimizer(draft)
    _convert_evaluations(draft)
    _convert_order(draft, shuffles)
    _convert_trackers(draft)
    _convert_hub(draft)


def _convert_batch(draft: Draft, devices: int | None) -> None:
    """Count a step's rows: over all devices here, on one of them there."""
    rows, microbatches = (
        draft.count(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if rows is None or microbatches is None:
        return
    if devices is None:
        draft.problems.append(
            "--devices: got nothing, expected the number of devices that the file was for; "
            f"training.batch_size is the rows of a step over all of them: {rows} (per_device_"
            f"train_batch_size) x {microbatches} (gradient_accumulation_steps) x devices"
        )
        return
    draft.set("per_device_train_batch_size", "training.batch_size", rows * microbatches * devices)
    draft.set("gradient_accumulation_steps", "training.gradient_accumulation_steps", microbatches)


def _convert_steps(draft: Draft) -> None:
    """Convert what is counted in steps: the run's length, checkpoints, log."""
    limit = draft.values.get("max_steps", -1)
    if limit != -1:
        draft.set("max_steps", "training.max_steps", limit)
    for key, ours in (
        ("save_steps", "checkpoint.save_steps"),
        ("logging_steps", "logging.logging_steps"),
    ):
        steps = draft.count(key)
        if steps is not None:
            draft.set(key, ours, steps)


def _convert_schedule(draft: Draft) -> None:
    """Convert the course of the learning rate."""
    kind = draft.values["lr_scheduler_type"]
    if kind not in SCHEDULES:
        draft.refuse("lr_scheduler_type", f"one of {', '.join(SCHEDULES)}", "others are not here")
        return
    draft.set("lr_scheduler_type", "optimizer.lr_scheduler_type", kind)
    _convert_warmup(draft, kind)
    _convert_schedule_options(draft, kind)


def _convert_warmup(draft: Draft, kind: str) -> None:
    """Convert the warm-up: there steps win over a ratio unless they are 0, here unless null."""
    steps, ratio = draft.values.get("warmup_steps", 0), draft.values.get("warmup_ratio", 0.0)
    if kind == "constant":
        for key in ("warmup_steps", "warmup_ratio"):
            if draft.given.get(key):
                draft.tell(key, "the schedule constant has no warm-up, there neither", same=True)
    elif isinstance(steps, float) and 0 < steps < 1:
        draft.set("warmup_steps", "optimizer.warmup_ratio", steps)
    elif steps:
        count = draft.count("warmup_steps")
        if count is not None:
            draft.set("warmup_steps", "optimizer.warmup_steps", count)
    else:
        draft.set("warmup_ratio", "optimizer.warmup_ratio", ratio)


def _convert_schedule_options(draft: Draft, kind: str) -> None:
    """Convert `lr_scheduler_kwargs`, which each schedule has its own of."""
    options = draft.values.get("lr_scheduler_kwargs") or {}
    known = {
        "cosine_with_restarts": {"num_cycles"},
        "cosine_with_min_lr": {"min_lr", "min_lr_rate"},
    }
    if not isinstance(options, dict) or options.keys() - known.get(kind, set()):
        expected = " or ".join(sorted(known.get(kind, {"none"})))
        draft.refuse("lr_scheduler_kwargs", f"{expected} with {kind}", "others are not here")
        return
    rate = draft.values["learning_rate"]
    for key, value in options.items():
        if not isinstance(value, int | float) or not isinstance(rate, int | float) or not rate:
            draft.refuse("lr_scheduler_kwargs", "numbers, and a learning rate", "write them so")
        elif key == "num_cycles":
            draft.set("lr_scheduler_kwargs", "optimizer.num_cycles", value)
        else:
            floor = value / rate if key == "min_lr" else value
            draft.set("lr_scheduler_kwargs", "optimizer.min_lr_ratio", floor)


def _convert_optimizer(draft: Draft) -> None:
    """Convert the update rule; the fused kernels of AdamW are AdamW."""
    rule = draft.values.get("optim", "adamw_torch")
    if isinstance(rule, str) and rule in OPTIMIZERS:
        draft.set("optim", "optimizer.optim", OPTIMIZERS[rule])
    else:
        draft.refuse("optim", f"one of {', '.join(OPTIMIZERS)}", "others are not here")


def convert_dtype(draft: Draft, neither: str) -> None:
    """Convert the number type of the computation.

    Args:
        draft: changed.
        neither: what it is where neither bf16 nor fp16 is on.
    """
    both = draft.on("bf16"), draft.on("fp16")
    if all(both):
        draft.refuse("fp16", "one of bf16 and fp16", "take one out")
    dtype = {(True, False): "bfloat16", (False, True): "float16"}.get(both, neither)
    draft.set("fp16" if both[1] else "bf16", "model.dtype", dtype)


def _convert_evaluations(draft: Draft) -> None:
    """Convert when evaluations are made; the rows are set already."""
    name = "evaluation_strategy" if "evaluation_strategy" in draft.given else "eval_strategy"
    strategy = draft.values.get(name, "no")
    has_rows = "data.eval" in draft.ours or "data.val_size" in draft.ours
    # YAML reads a bare `no` as false.
    if strategy not in ("no", False, "steps", "epoch"):
        draft.refuse(name, "no, steps or epoch", "write one of them")
    elif strategy == "steps" and not has_rows:
        draft.refuse(name, "rows to evaluate on beside it", "name them, or take it out")
    elif strategy == "steps":
        key = "eval_steps" if "eval_steps" in draft.given else "logging_steps"
        steps = draft.count(key)
        if steps is not None:
            draft.set(key, "training.eval_steps", steps)
    elif strategy == "epoch":
        draft.tell(name, "one evaluation, at the end; training.eval_steps makes more")
    elif has_rows:
        draft.tell(name, "one evaluation, at the end", same=True)


def _convert_order(draft: Draft, shuffles: bool) -> None:
    """Convert whether every epoch has a new order."""
    strategy = draft.values.get("train_sampling_strategy", "random")
    if strategy == "sequential" or not shuffles:
        key = "train_sampling_strategy" if strategy == "sequential" else "disable_shuffling"
        draft.set(key, "data.shuffle", False)
    elif strategy != "random":
        draft.tell("train_sampling_strategy", "only the order of rows, drawn here", same=True)


def _convert_trackers(draft: Draft) -> None:
    """Convert where metrics go; those that are not here are told of."""
    wanted = draft.values.get("report_to", "all")
    names = wanted if isinstance(wanted, list) else [wanted]
    if "all" in names:
        return
    there = [name for name in names if name != "none" and _is_tracker(name)]
    missing = [shown(name) for name in names if name != "none" and name not in there]
    draft.set("report_to", "logging.report_to", there)
    if missing:
        draft.tell("report_to", f"{', '.join(missing)} is not here; metrics.jsonl has every figure")


def _convert_hub(draft: Draft) -> None:
    """Convert where the export is uploaded."""
    if not draft.on("push_to_hub"):
        return
    if not draft.values.get("hub_model_id"):
        draft.refuse("hub_model_id", "organization/name beside push_to_hub", "write it")
        return
    draft.set("hub_model_id", "export.push_to_hub", draft.values["hub_model_id"])
    draft.taken.add("push_to_hub")
    if "hub_private_repo" in draft.given:
        draft.set("hub_private_repo", "export.hub_private_repo", draft.on("hub_private_repo"))
    else:
        draft.tell("hub_private_repo", "the repository is private, which theirs is not")


def _is_tracker(name: object) -> bool:
    try:
        LoggingSection.model_validate({"report_to": [name]})
    except ValidationError:
        return False
    return True
