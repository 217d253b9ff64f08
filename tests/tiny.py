# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints in Hugging Face form, made by transformers' own classes.

In: a folder and the name of a variant. Out: what a hub repository would hold (config, weights in
one or several files, tokenizer, generation config, licence), and reference logits in float32.
Not here: adapters and training loops (tests/parity), anything that needs the network.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepseek_variants
import llama_variants
import numpy as np
import quantised
import torch
from deepseek_moe import DeepseekConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "deepseek": DeepseekConfig,
    "deepseek_v2": DeepseekV2Config,
    "deepseek_v3": DeepseekV3Config,
    "deepseek_v32": DeepseekV32Config,
}

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL_TOKENS = [BOS, EOS, PAD, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
TOKENIZER_SIZE = 272

CHAT_TEMPLATE = """\
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- message['content'] -}}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""

_SHAPE = {
    "vocab_size": 288,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
VARIANTS = llama_variants.VARIANTS | deepseek_variants.VARIANTS


def build_checkpoint(
    directory: str | Path,
    variant: str,
    seed: int = 0,
    dtype: str | None = None,
    shards: int | None = None,
    **config: Any,
) -> Path:
    """Write the checkpoint of `variant` to `directory`; other arguments override the variant.

    `shards` is how many files at least: a tiny model's embedding fills one by itself.
    """
    directory = Path(directory)
    settings = VARIANTS[variant] | config
    files = {
        "dtype": dtype or settings.pop("dtype", "float32"),
        "shards": shards or settings.pop("shards", 1),
        "form": settings.pop("form", "safetensors"),
        "dialect": settings.pop("dialect", "v5"),
        "absent": settings.pop("absent", ()),
        "inv_freq": settings.pop("inv_freq", False),
        "head_copy": settings.pop("head_copy", False),
        "spread": settings.pop("spread", 0.15),
        "mtp": settings.pop("mtp", 0),
        "fp8": settings.pop("fp8", None),
        "ue8m0": settings.pop("ue8m0", False),
    }
    settings = {key: value for key, value in settings.items() if key not in files}
    model = random_model(seed, files["spread"], **settings).to(getattr(torch, files["dtype"]))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    _save_weights(model, directory, files)
    if files["dialect"] == "hub":
        _rewrite_config_as_on_the_hub(directory / "config.json", settings, files["absent"])
    write_tokenizer(directory)
    (directory / "LICENSE").write_text("Random numbers; no rights reserved.\n")
    return directory


def random_model(seed: int, spread: float, model_type: str, **settings: Any) -> PreTrainedModel:
    """A float32 model whose every tensor matters: norms are not 1, biases not 0, logits clear."""
    shape = _SHAPE | {"bos_token_id": 0, "eos_token_id": 1} | settings
    config = CONFIGS[model_type](**shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomise(name, parameter, generator, spread)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3, generator=generator)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return model


def _randomise(
    name: str, parameter: torch.Tensor, generator: torch.Generator, spread: float
) -> None:
    if name.endswith("norm.weight"):
        parameter.uniform_(0.6, 1.6, generator=generator)
    elif name.endswith(".bias"):
        parameter.normal_(0.0, 0.3, generator=generator)
    elif "embed_tokens" in name or "lm_head" in name or name.endswith("mlp.gate.weight"):
        parameter.normal_(0.0, 0.3, generator=generator)
    else:
        parameter.normal_(0.0, spread, generator=generator)


def _save_weights(model: PreTrainedModel, directory: Path, files: Mapping[str, Any]) -> None:
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    size = total if files["shards"] == 1 else total // files["shards"] + 1
    model.save_pretrained(directory, max_shard_size=size)
    paths = sorted(directory.glob("model*.safetensors"))
    if (len(paths) > 1) != (files["shards"] > 1):
        raise AssertionError(f"{len(paths)} shards written, {files['shards']} asked")
    if files["inv_freq"]:
        _add_tensors(paths[-1], _inv_freq(model))
    if files["head_copy"]:
        weight = model.get_input_embeddings().weight.detach()
        _add_tensors(paths[-1], {"lm_head.weight": weight.clone()})
    if files["mtp"]:
        quantised.add_prediction_modules(directory, model.config.num_hidden_layers, files["mtp"])
    if files["fp8"]:
        quantised.quantise_folder(directory, files["fp8"], files["ue8m0"])
    if files["form"] == "bin":
        _turn_into_bin(directory, paths)


def _inv_freq(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The rotary buffers that conversions of 2023 saved with the weights."""
    buffer = model.get_submodule("model.rotary_emb").get_buffer("inv_freq")
    layers = range(model.config.num_hidden_layers)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in layers]
    return {name: buffer.detach().clone() for name in names}


def _add_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(load_file(path) | dict(tensors), path, metadata={"format": "pt"})


def _turn_into_bin(directory: Path, paths: list[Path]) -> None:
    total = len(paths)
    weight_map: dict[str, str] = {}
    for number, path in enumerate(paths, start=1):
        name = "pytorch_model.bin"
        if total > 1:
            name = f"pytorch_model-{number:05d}-of-{total:05d}.bin"
        tensors = load_file(path)
        torch.save(tensors, directory / name)
        path.unlink()
        weight_map |= dict.fromkeys(tensors, name)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text()) | {"weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(content, indent=2))
        index.unlink()


def _rewrite_config_as_on_the_hub(
    path: Path, settings: Mapping[str, Any], absent: Sequence[str]
) -> None:
    """Turn transformers 5's config keys into those of the published files."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "linear":
        # The Coder files of 2023 say `type`, not `rope_type`.
        config["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    for key in ("layer_types", "pad_token_id"):
        config.pop(key, None)
    if "head_dim" not in settings:
        config.pop("head_dim", None)
    for key in ("use_sliding_window", "sliding_window", "max_window_layers"):
        if key in settings:
            config[key] = settings[key]
    config = deepseek_variants.hub_config(config)
    for key in absent:
        config.pop(key, None)
    config["transformers_version"] = "4.39.3"
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE of TOKENIZER_SIZE tokens, DeepSeek's special ones among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the question and the answer", "the other answer"] * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def random_ids(vocab_size: int, batch: int = 2, length: int = 40, seed: int = 1) -> np.ndarray:
    """Token ids [batch, length], int32, over the whole vocabulary."""
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length), dtype=np.int32)


def reference_model(directory: str | Path, dtype: str = "float32") -> PreTrainedModel:
    """transformers' model of the checkpoint: eager attention, evaluation mode."""
    with quantised.readable_by_torch(directory) as folder:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            experts_implementation="eager",
        )
    return model.eval()


def reference_logits(
    directory: str | Path,
    ids: np.ndarray,
    position_ids: np.ndarray | None = None,
    dtype: str = "float32",
) -> np.ndarray:
    """transformers' logits [B, T, V], computed in `dtype`, as float32."""
    return logits(reference_model(directory, dtype), ids, position_ids)


@torch.no_grad()
def logits(
    model: torch.nn.Module, ids: np.ndarray, position_ids: np.ndarray | None = None
) -> np.ndarray:
    """Logits of a torch model, without a cache."""
    positions = None if position_ids is None else torch.as_tensor(position_ids, dtype=torch.long)
    ids_tensor = torch.as_tensor(ids, dtype=torch.long)
    return model(ids_tensor, position_ids=positions, use_cache=False).logits.float().numpy()
