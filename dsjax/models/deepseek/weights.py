# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a DeepSeek checkpoint is which parameter; read for import and for export."""

from dsjax.models.deepseek.config import DeepseekConfig
from dsjax.models.weight_rules import Rule

_LINEARS = ("q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
_ATTENTION = (
    *(f"{name}.{kind}" for name in (*_LINEARS, "o_proj") for kind in ("weight", "bias")),
    "q_a_layernorm.weight",
    "kv_a_layernorm.weight",
    "indexer.wq_b.weight",
    "indexer.wk.weight",
    "indexer.k_norm.weight",
    "indexer.k_norm.bias",
    "indexer.weights_proj.weight",
)
_MAPS = ("gate_proj", "up_proj", "down_proj")
_BLOCK = (
    "input_layernorm.weight",
    *(f"self_attn.{name}" for name in _ATTENTION),
    "post_attention_layernorm.weight",
    *(f"mlp.{name}.{kind}" for name in _MAPS for kind in ("weight", "bias")),
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    *(f"mlp.shared_experts.{name}.{kind}" for name in _MAPS for kind in ("weight", "bias")),
)


def rules(config: DeepseekConfig) -> list[Rule]:
    """The table of a model; its dense layers and its layers with experts are two stacks."""
    found = [Rule("model.embed_tokens.weight", "model.embed_tokens.weight")]
    for stack, first in (("dense_layers", 0), ("layers", config.dense_layers)):
        found += [
            Rule(f"model.layers.{{layer}}.{name}", f"model.{stack}.{name}", first)
            for name in _BLOCK
        ]
        found += [
            Rule(
                f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight",
                f"model.{stack}.mlp.experts.{name}.weight",
                first,
            )
            for name in _MAPS
        ]
    return [
        *found,
        Rule("model.norm.weight", "model.norm.weight"),
        Rule("lm_head.weight", "lm_head.weight"),
    ]


def carried(config: DeepseekConfig) -> list[str]:
    """Tensors that are kept without being computed with: the modules for multi-token prediction."""
    last = config.num_hidden_layers
    modules = [rf"model\.layers\.{last + i}\..*" for i in range(config.num_nextn_predict_layers)]
    return [*modules, r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
