# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-MoE 16B in torch: transformers has no class for model_type `deepseek`.

In: its config. Out: `DeepseekForCausalLM`, known to transformers' Auto classes once this file is
imported. Its attention is Llama's; what a router and experts do follows arXiv 2401.06066, with
`norm_topk_prob`. Not here: anything of dsjax.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class DeepseekConfig(LlamaConfig):
    """Llama's fields and those of the experts."""

    model_type = "deepseek"

    moe_intermediate_size: int = 1408
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False


class Expert(nn.Module):
    """SiLU-gated feed-forward without biases."""

    def __init__(self, narrow: int, wide: int):
        super().__init__()
        self.gate_proj = nn.Linear(narrow, wide, bias=False)
        self.up_proj = nn.Linear(narrow, wide, bias=False)
        self.down_proj = nn.Linear(wide, narrow, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Widen, gate, narrow."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Every expert on every token, weighted by 0 where it was not chosen, plus the shared ones."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        size, wide = config.hidden_size, config.moe_intermediate_size
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(Expert(size, wide) for _ in range(config.n_routed_experts))
        self.shared_experts = Expert(size, wide * config.n_shared_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Softmax over all experts, the best of them, their weighted sum."""
        scores = self.gate(x).float().softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        by_expert = torch.zeros_like(scores).scatter(-1, chosen, weights)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * by_expert.unsqueeze(-2)).sum(-1).to(x.dtype) + self.shared_experts(x)


class DeepseekForCausalLM(LlamaForCausalLM):
    """Llama, with experts in its later layers."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            sparse = number >= config.first_k_dense_replace
            layer.mlp = MoE(config) if sparse else LlamaMLP(config)
        self.post_init()


AutoConfig.register("deepseek", DeepseekConfig)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
