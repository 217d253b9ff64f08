# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a Llama-shaped checkpoint is which parameter; read for import and for export."""

from dsjax.models.llama.config import LlamaConfig
from dsjax.models.weight_rules import Rule

_BLOCK = (
    "input_layernorm.weight",
    *(
        f"self_attn.{name}_proj.{kind}"
        for name in ("q", "k", "v", "o")
        for kind in ("weight", "bias")
    ),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
    *(f"mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")),
)


def rules(config: LlamaConfig, ahead: bool = False) -> list[Rule]:
    """Return the table of a model."""
    del config, ahead
    return [
        Rule("model.embed_tokens.weight", "model.embed_tokens.weight"),
        *(Rule(f"model.layers.{{layer}}.{name}", f"model.layers.{name}") for name in _BLOCK),
        Rule("model.norm.weight", "model.norm.weight"),
        Rule("lm_head.weight", "lm_head.weight"),
    ]


def carried(config: LlamaConfig, ahead: bool = False) -> list[str]:
    """Tensors of old checkpoints that hold nothing which config.json does not say."""
    del config, ahead
    return [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
