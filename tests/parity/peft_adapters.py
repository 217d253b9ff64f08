# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters on disk, with every number random, and PEFT models that train or apply them.

In: a checkpoint folder and PEFT's own config fields. Out: an adapter folder that PEFT saved.
Not here: dsjax.
"""

from pathlib import Path
from typing import Any

import tiny
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file


def build_lora(checkpoint: Path, directory: Path, seed: int = 5, **fields: Any) -> Path:
    """Save a LoRA adapter whose B is not zero, so that the first step already needs the scaling."""
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, **fields)
    return _build(checkpoint, directory, config, "lora_", (0.0, 0.1), seed)


def build_ia3(checkpoint: Path, directory: Path, seed: int = 5, **fields: Any) -> Path:
    """Save an IA3 adapter whose vectors are not ones."""
    config = IA3Config(task_type=TaskType.CAUSAL_LM, **fields)
    return _build(checkpoint, directory, config, "ia3_l", (1.0, 0.3), seed)


def _build(
    checkpoint: Path,
    directory: Path,
    config: PeftConfig,
    part: str,
    normal: tuple[float, float],
    seed: int,
) -> Path:
    """Save an adapter with normal draws, of a mean and a spread, where a name holds `part`."""
    model = get_peft_model(tiny.reference_model(checkpoint), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # near the length of the weight's row, which it begins as
                change = torch.empty_like(parameter).normal_(1.0, 0.2, generator=generator)
                parameter.mul_(change)
            elif part in name:
                parameter.normal_(*normal, generator=generator)
    model.save_pretrained(directory)
    return directory


def build_prefix(checkpoint: Path, directory: Path, tokens: int, seed: int = 5) -> Path:
    """Save a prefix of `tokens` virtual tokens."""
    model = _new_prefix(checkpoint, tokens)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        prefix_weight(model).normal_(0.0, 0.5, generator=generator)
    model.save_pretrained(directory)
    return directory


def _new_prefix(checkpoint: Path, tokens: int) -> PeftModel:
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=tokens)
    return get_peft_model(tiny.reference_model(checkpoint), config)


def prefix_weight(model: PeftModel) -> torch.nn.Parameter:
    return model.prompt_encoder["default"].embedding.weight


def trainable_lora(checkpoint: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(tiny.reference_model(checkpoint), adapter, is_trainable=True)


def trainable_prefix(checkpoint: Path, adapter: Path, tokens: int) -> PeftModel:
    """PEFT refuses to resume a prefix (issue 2256): make a new one and copy the numbers in."""
    saved = PeftModel.from_pretrained(tiny.reference_model(checkpoint), adapter)
    model = _new_prefix(checkpoint, tokens)
    with torch.no_grad():
        prefix_weight(model).copy_(prefix_weight(saved))
    return model


def load_strictly(checkpoint: Path, adapter: Path) -> PeftModel:
    """Load an adapter into PEFT; fail on a key that PEFT misses or would drop without a word."""
    model = PeftModel.from_pretrained(tiny.reference_model(checkpoint), adapter)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = load_file(adapter / "adapter_model.safetensors")
    # Of a targeted head PEFT saves the base's weight too.
    found = {name: tensor for name, tensor in found.items() if ".base_layer." not in name}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(expected[name].float(), tensor.float(), rtol=0, atol=0, msg=name)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Any) -> torch.Tensor:
    return model(input_ids=torch.as_tensor(ids, dtype=torch.long)).logits.float()
