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

_BEFORE_BLOCK = ("enorm", "hnorm", "eh_proj")


def rules(config: DeepseekConfig, ahead: bool = False) -> list[Rule]:
    """Return the table of a model; its dense layers and its layers with experts are two stacks.

    Args:
        config: of the model.
        ahead: whether it has the module for multi-token prediction.
    """
    return [
        Rule("model.embed_tokens.weight", "model.embed_tokens.weight"),
        *_stack_rules("model.dense_layers", 0),
        *_stack_rules("model.layers", config.dense_layers),
        Rule("model.norm.weight", "model.norm.weight"),
        Rule("lm_head.weight", "lm_head.weight"),
        *(_prediction_rules(config) if ahead else ()),
    ]


def _stack_rules(path: str, first: int) -> list[Rule]:
    """Return the rules of a stack, whose first layer has number `first` in the checkpoint."""
    block = [Rule(f"model.layers.{{layer}}.{name}", f"{path}.{name}", first) for name in _BLOCK]
    experts = [
        Rule(
            f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight",
            f"{path}.mlp.experts.{name}.weight",
            first,
        )
        for name in _MAPS
    ]
    return block + experts


def _prediction_rules(config: DeepseekConfig) -> list[Rule]:
    """Return the rules of the MTP module, which the files hold as the layer after the last."""
    number = config.num_hidden_layers
    layer, embedding = f"model.layers.{number}", "model.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    return [
        *_stack_rules("mtp.block", number),
        *(Rule(f"{layer}.{name}.weight", f"mtp.{name}.weight") for name in _BEFORE_BLOCK),
        Rule(f"{layer}.shared_head.norm.weight", "mtp.norm.weight"),
        Rule(f"{layer}.embed_tokens.weight", embedding, copy=True),
        Rule(f"{layer}.shared_head.head.weight", head, copy=True),
    ]


def carried(config: DeepseekConfig, ahead: bool = False) -> list[str]:
    """Tensors that are kept without being computed with: modules for multi-token prediction."""
    last, count = config.num_hidden_layers, 0 if ahead else config.num_nextn_predict_layers
    modules = [rf"model\.layers\.{last + i}\..*" for i in range(count)]
    return [*modules, r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
