# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's own architectures among the tiny checkpoints: their variants, configs and names.

In: nothing; tests/tiny.py builds what this table says. Out: the variants, the hub's form of a
config.json, and the tensors of a torch model under the names that they have on disk. Not here: FP8
and modules for multi-token prediction (tests/quantised.py), MoE-16B's class
(tests/deepseek_moe.py).
"""

from collections.abc import Iterator
from typing import Any

import torch

_SHAPE = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_V2 = {"model_type": "deepseek_v2", **_SHAPE, "n_group": 1, "topk_group": 1}
_V2_GROUPS = {
    **_V2,
    "n_routed_experts": 16,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 16.0,
}
_V3 = {
    "model_type": "deepseek_v3",
    **_SHAPE,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}
# Fewer heads would give scores of exactly 0, and of equal scores torch and JAX keep different ones.
_V32 = {
    **{key: value for key, value in _V3.items() if key != "num_nextn_predict_layers"},
    "model_type": "deepseek_v32",
    "index_n_heads": 16,
    "index_head_dim": 14,
    "index_topk": 9,
}
_MOE_16B = {
    "model_type": "deepseek",
    "num_key_value_heads": 4,
    **{key: _SHAPE[key] for key in _SHAPE if "exp" in key or key == "moe_intermediate_size"},
    "first_k_dense_replace": 1,
}


def _yarn(
    mscale: float | None, all_dim: float | None, factor: float = 4.0, **others: Any
) -> dict[str, Any]:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": factor,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": all_dim,
    }
    rope = {key: value for key, value in rope.items() if value is not None}
    return {"rope_parameters": rope | others, "max_position_embeddings": int(32 * factor)}


# As in tests/tiny.py, and: `mtp`, how many modules for multi-token prediction lie in the files;
# `fp8`, the size of a quantised block; `ue8m0`, whether scales are powers of two; `spread`, the
# deviation of weights, smaller in a wider model.
VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_v2_lite_hub": {
        **_V2,
        "q_lora_rank": None,
        "dialect": "hub",
        "dtype": "bfloat16",
        **_yarn(0.707, 0.707, factor=40.0),
    },
    "deepseek_v2_groups": {**_V2_GROUPS, **_yarn(0.707, 0.707)},
    "deepseek_v2_groups_hub": {
        **_V2_GROUPS,
        "topk_group": 3,
        "num_experts_per_tok": 6,
        "dialect": "hub",
        "shards": 3,
        **_yarn(1.0, 1.0, factor=40.0),
    },
    "deepseek_v2_biases": {
        **_V2,
        "attention_bias": True,
        "mlp_bias": True,
        "first_k_dense_replace": 0,
    },
    # mscale / mscale_all_dim is no longer 1, and the sizes of keys and values cross.
    "deepseek_v2_yarn_mscale": {
        **_V2,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 10,
        "v_head_dim": 14,
        "first_k_dense_replace": 2,
        **_yarn(1.2, 0.7, beta_fast=4.0, truncate=False),
    },
    "deepseek_v2_dense_tied": {
        **_V2,
        "q_lora_rank": None,
        "first_k_dense_replace": 3,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
    },
    "deepseek_v2_defaults_hub": {
        **_V2,
        "first_k_dense_replace": 0,
        "dialect": "hub",
        "max_position_embeddings": 2048,
        "absent": (
            *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
            *("rope_scaling", "attention_bias", "mlp_bias", "tie_word_embeddings", "torch_dtype"),
            *("first_k_dense_replace", "n_shared_experts", "n_group", "topk_group"),
            *("topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor"),
        ),
    },
    "deepseek_v3": {**_V3, "routed_scaling_factor": 2.5, **_yarn(1.0, 1.0)},
    "deepseek_v3_hub": {
        **_V3,
        "dialect": "hub",
        "dtype": "bfloat16",
        "shards": 3,
        "num_nextn_predict_layers": 1,
        **_yarn(1.0, 1.0, factor=40.0),
    },
    "deepseek_v3_plain": {
        **_V3,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_interleave": False,
        "first_k_dense_replace": 0,
    },
    "deepseek_v3_odd": {
        **_V3,
        "vocab_size": 281,
        "intermediate_size": 77,
        "moe_intermediate_size": 21,
        "n_shared_experts": 3,
        "kv_lora_rank": 19,
        "q_lora_rank": 23,
        "qk_rope_head_dim": 6,
        "v_head_dim": 11,
        "rms_norm_eps": 1e-3,
        "attention_bias": True,
        "norm_topk_prob": False,
    },
    "deepseek_v3_dense_tied": {
        **_V3,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 3,
        "tie_word_embeddings": True,
        "rope_interleave": False,
        **_yarn(None, 1.0),
    },
    "deepseek_v3_defaults_hub": {
        **_V3,
        "n_routed_experts": 32,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 3,
        "dialect": "hub",
        "max_position_embeddings": 4096,
        "absent": (
            *("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
            *("attention_bias", "tie_word_embeddings", "torch_dtype", "first_k_dense_replace"),
            *("n_shared_experts", "n_group", "topk_group", "topk_method", "scoring_func"),
            *("norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers"),
        ),
    },
    "deepseek_v3_bin": {**_V3, "form": "bin", "shards": 2, "dtype": "bfloat16"},
    "deepseek_v3_mtp": {**_V3, "num_nextn_predict_layers": 2, "mtp": 2, **_yarn(1.0, 1.0)},
    "deepseek_v3_fp8_mtp_hub": {
        **_V3,
        "dialect": "hub",
        "dtype": "bfloat16",
        "shards": 3,
        "num_nextn_predict_layers": 1,
        "mtp": 1,
        "fp8": (16, 16),
        **_yarn(1.0, 1.0, factor=40.0),
    },
    # Blocks of the real size, cut at the edges as those of kv_a_proj_with_mqa are in V3.
    "deepseek_v3_fp8_wide": {
        **_V3,
        "hidden_size": 144,
        "spread": 0.09,
        "intermediate_size": 200,
        "moe_intermediate_size": 136,
        "n_routed_experts": 8,
        "kv_lora_rank": 136,
        "q_lora_rank": 160,
        "qk_nope_head_dim": 24,
        "v_head_dim": 34,
        "num_hidden_layers": 2,
        "dtype": "bfloat16",
        "fp8": (128, 128),
        **_yarn(1.0, 1.0),
    },
    "deepseek_v3_fp8_ue8m0": {
        **_V3,
        "q_lora_rank": None,
        "fp8": (16, 8),
        "ue8m0": True,
        **_yarn(1.0, 1.0),
    },
    "deepseek_v32_dense": {**_V32, "index_topk": 64, **_yarn(1.0, 1.0)},
    "deepseek_v32_sparse": {**_V32, "attention_bias": True, **_yarn(1.0, 1.0)},
    "deepseek_v32_fp8_mtp_hub": {
        **_V32,
        "dialect": "hub",
        "dtype": "bfloat16",
        "mtp": 1,
        "fp8": (16, 16),
        "ue8m0": True,
        **_yarn(1.0, 1.0, factor=40.0),
    },
    "deepseek_moe_hub": {**_MOE_16B, "dialect": "hub", "dtype": "bfloat16", "shards": 2},
    "deepseek_moe_norm": {
        **_MOE_16B,
        "norm_topk_prob": True,
        "num_key_value_heads": 2,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
    },
}

BLOCKS_OF_64 = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 32,
    "v_head_dim": 16,
    "moe_intermediate_size": 64,
}
"""Sizes with which latent attention has input sizes that 64 divides, output sizes that 32 does."""

NEVER_TRAINED = ("e_score_correction_bias", ".indexer.")
"""In the names of tensors that get no gradient of the loss."""


def hub_config(config: dict[str, Any]) -> dict[str, Any]:
    """The hub's form of a config.json, from one whose general keys have that form already."""
    kind = config["model_type"]
    if not kind.startswith("deepseek"):
        return config
    ours = ("qk_head_dim", "mlp_layer_types", "num_mtp_layers", "output_router_logits")
    config = {key: value for key, value in config.items() if key not in ours}
    if config.get("rope_interleave"):
        del config["rope_interleave"]  # no file of the hub has it
    if config.get("rope_scaling"):
        rope = dict(config["rope_scaling"])
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    newer = kind in ("deepseek_v3", "deepseek_v32")
    config |= {
        "moe_layer_freq": 1,
        "ep_size": 1,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "scoring_func": "sigmoid" if newer else "softmax",
    }
    return config | ({"topk_method": "noaux_tc", "num_nextn_predict_layers": 1} if newer else {})


def file_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Name on disk, value and gradient of every tensor; transformers keeps experts fused."""
    for name, parameter in model.named_parameters():
        parts = [(name, slice(None), slice(None))]
        width = parameter.shape[1] // 2 if parameter.ndim == 3 else 0
        if name.endswith("experts.gate_up_proj"):
            sides = {"gate_proj": slice(None, width), "up_proj": slice(width, None)}
            parts = [
                (_expert(name, expert, side), expert, rows)
                for expert in range(len(parameter))
                for side, rows in sides.items()
            ]
        elif name.endswith("experts.down_proj"):
            whole = slice(None)
            parts = [(_expert(name, e, "down_proj"), e, whole) for e in range(len(parameter))]
        for part, first, rows in parts:
            index = (first, rows) if parameter.ndim > 1 else (first,)
            gradient = parameter.grad
            yield part, parameter.data[index], None if gradient is None else gradient[index]
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            yield name, buffer, None


def _expert(name: str, expert: int, side: str) -> str:
    return f"{name.rpartition('.')[0]}.{expert}.{side}.weight"
