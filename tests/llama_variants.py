# SPDX-License-Identifier: Apache-2.0
"""The Llama family among the tiny checkpoints: the variants of Llama, Qwen 2 and Qwen 3.

In: nothing; tests/tiny.py builds what this table says. Out: the variants. Not here: DeepSeek's own
architectures (tests/deepseek_variants.py).
"""

from typing import Any

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_YARN_LENGTH = {"max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WINDOW = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 2,
    "num_hidden_layers": 4,
}


def _rope(theta: float = 1e4, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


# These keys describe the files: `dtype`, `shards`, `form` (safetensors or bin), `dialect` (hub: the
# config keys of hub files, v5: those of transformers 5), `absent` (config keys left to defaults),
# `inv_freq` (buffers that old conversions saved), `head_copy` (a tied head saved a second time, as
# torch does). `model_type` and everything else is the model's config, over the
# shape in tests/tiny.py.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama_mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama_gqa": {"model_type": "llama", "shards": 3},
    "llama_mqa": {"model_type": "llama", "num_key_value_heads": 1, "num_hidden_layers": 2},
    "llama_head_dim": {"model_type": "llama", "head_dim": 20, "num_attention_heads": 6},
    "llama_linear_hub": {
        "model_type": "llama",
        "dialect": "hub",
        **_rope(1e5, rope_type="linear", factor=4.0),
    },
    "llama_llama3": {"model_type": "llama", **_rope(5e5, **_LLAMA3)},
    "llama_llama3_hub": {
        "model_type": "llama",
        "dialect": "hub",
        "dtype": "bfloat16",
        "shards": 2,
        **_rope(5e5, **_LLAMA3),
    },
    "llama_yarn": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        **_YARN_LENGTH,
        **_rope(1e4, **_YARN),
    },
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_odd": {
        "model_type": "llama",
        "vocab_size": 281,
        "intermediate_size": 77,
        "rms_norm_eps": 1e-3,
        "num_hidden_layers": 2,
        **_rope(77777.0),
    },
    "llama_float16_hub": {"model_type": "llama", "dialect": "hub", "dtype": "float16"},
    "llama_bin": {"model_type": "llama", "form": "bin", "shards": 2, "dialect": "hub"},
    "llama_bin_bfloat16": {
        "model_type": "llama",
        "form": "bin",
        "dtype": "bfloat16",
        "inv_freq": True,
    },
    "llama_tied_bin_head_copy": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "form": "bin",
        "head_copy": True,
    },
    "llama_defaults_hub": {
        "model_type": "llama",
        "dialect": "hub",
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "absent": (
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "rope_scaling",
            "attention_bias",
            "mlp_bias",
            "tie_word_embeddings",
            "torch_dtype",
        ),
    },
    "llama_inv_freq": {"model_type": "llama", "inv_freq": True, "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_bfloat16": {"model_type": "qwen2", "dtype": "bfloat16", "dialect": "hub", "shards": 2},
    "qwen2_window": {"model_type": "qwen2", **_WINDOW},
    "qwen2_window_hub": {"model_type": "qwen2", "dialect": "hub", **_WINDOW},
    "qwen2_window_off_hub": {
        "model_type": "qwen2",
        "dialect": "hub",
        **(_WINDOW | {"use_sliding_window": False}),
    },
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, **_rope(1e6)},
    "qwen3_defaults_hub": {
        "model_type": "qwen3",
        "dialect": "hub",
        "head_dim": 128,
        "num_hidden_layers": 2,
        "absent": ("head_dim", "max_window_layers", "use_sliding_window", "sliding_window"),
    },
    "qwen3_yarn_attn_factor": {
        "model_type": "qwen3",
        "dialect": "hub",
        "head_dim": 16,
        **_YARN_LENGTH,
        **_rope(1e6, **_YARN, attn_factor=0.8782488562869419),
    },
    "qwen3_yarn_mscale": {
        "model_type": "qwen3",
        "head_dim": 16,
        **_YARN_LENGTH,
        **_rope(1e4, **_YARN, mscale=1.2, mscale_all_dim=0.7, beta_fast=4.0, truncate=False),
    },
    "qwen3_yarn_attention_factor": {
        "model_type": "qwen3",
        "head_dim": 16,
        **_YARN_LENGTH,
        **_rope(1e4, **_YARN, attention_factor=0.8, beta_fast=2.0, beta_slow=0.1),
    },
    "qwen3_bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "qwen3_window": {"model_type": "qwen3", "head_dim": 16, **(_WINDOW | {"max_window_layers": 1})},
    "qwen3_tied_bfloat16": {
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
}
