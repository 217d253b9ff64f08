# SPDX-License-Identifier: Apache-2.0
"""What the options of an objective need of the model and of the kind of training.

In: the `objective` section, the abstract model, the kind of adapter. Out: nothing, or one
ConfigError that names every option that cannot be had. Not done here: computing anything.
"""

from collections.abc import Container, Mapping

from dsjax.config import ObjectiveSection
from dsjax.errors import raise_all
from dsjax.models import MODELS, Model, base_shapes, entries_of
from dsjax.weights.safetensors import TensorInfo

BIAS = "e_score_correction_bias"


def check_objective(section: ObjectiveSection, model: Model, peft_type: str | None) -> None:
    """Refuse options that the model or the adapter has no place for.

    Args:
        section: the options.
        model: the abstract model.
        peft_type: kind of the adapter, None in full training.

    Raises:
        ConfigError: with a line for every option.
    """
    raise_all(
        [
            *_bias_problems(section, model, peft_type),
            *_prediction_problems(section, model, peft_type),
        ]
    )


def check_prediction(section: ObjectiveSection, model: Model, found: Container[str]) -> None:
    """Refuse to train a module for multi-token prediction that the files lack.

    Args:
        section: the options.
        model: the abstract model, with the module.
        found: names of the checkpoint's tensors.

    Raises:
        ConfigError: with the first of the missing tensors.
    """
    names = [entry.hf for entry in entries_of(model) if entry.path.startswith("mtp.")]
    missing = [name for name in names if name not in found]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise_all(
            [
                f"objective.mtp_loss_weight: got {section.mtp_loss_weight}, and the checkpoint "
                f"lacks {len(missing)} of the {len(names)} tensors of its module for multi-token "
                f"prediction: {shown}, expected 0; or fetch the files that hold them"
            ]
        )


def check_biases(section: ObjectiveSection, model: Model, found: Mapping[str, TensorInfo]) -> None:
    """Refuse to move biases that the export could not hold: steps of 0.001 vanish in 16 bits.

    Args:
        section: the options.
        model: the abstract model.
        found: the checkpoint's tensors.

    Raises:
        ConfigError: with the first of them.
    """
    if not section.bias_update_speed:
        return
    names = [entry.hf for entry in entries_of(model) if entry.path.endswith(f".{BIAS}")]
    coarse = [name for name in names if name in found and found[name].dtype.itemsize < 4]
    if coarse:
        raise_all(
            [
                f"{coarse[0]}: got {found[coarse[0]].dtype.name} with objective.bias_update_speed="
                f"{section.bias_update_speed}, expected float32 (so in {len(coarse)} tensors): an "
                "export keeps the file's dtype, which is too coarse for such steps; set it to 0, "
                "or take the published checkpoint"
            ]
        )


def _bias_problems(section: ObjectiveSection, model: Model, peft_type: str | None) -> list[str]:
    got = f"objective.bias_update_speed: got {section.bias_update_speed}"
    if not section.bias_update_speed:
        return []
    if peft_type is not None:
        return [
            f"{got} with {peft_type}, expected 0; the file of an adapter has no place for the "
            "routers' biases, full training has (adapter.peft_type=null)"
        ]
    if not any(path.endswith(f".{BIAS}") for path in base_shapes(model)):
        return [
            f"{got} for a model of model_type {model.config.model_type} without {BIAS}, expected "
            "0; only routers of topk_method noaux_tc have it (deepseek_v3, deepseek_v32)"
        ]
    return []


def _prediction_problems(
    section: ObjectiveSection, model: Model, peft_type: str | None
) -> list[str]:
    got = f"objective.mtp_loss_weight: got {section.mtp_loss_weight}"
    if not section.mtp_loss_weight:
        return []
    if peft_type is not None:
        return [
            f"{got} with {peft_type}, expected 0; the module for multi-token prediction is trained "
            "in full training only (adapter.peft_type=null)"
        ]
    kind = model.config.model_type
    if MODELS[kind].ahead is None:
        able = ", ".join(name for name, family in MODELS.items() if family.ahead)
        return [
            f"{got} for model_type {kind}, expected 0; these have a module for multi-token "
            f"prediction: {able}"
        ]
    count = model.config.num_nextn_predict_layers
    if count != 1:
        return [
            f"{got} for config.json num_nextn_predict_layers {count}, expected 0; one module for "
            "multi-token prediction is trained, neither none nor a chain of several"
        ]
    return []
