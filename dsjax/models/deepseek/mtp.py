# SPDX-License-Identifier: Apache-2.0
"""V3's module for multi-token prediction: one more layer, which predicts the token after the next.

In: the main model's states h_i and the embedding of token i + 1. Out: states for the shared head,
which then predicts token i + 2 (arXiv 2412.19437, 2.2). Not done here: embedding, head, loss.

Two things the report leaves open. The order in `eh_proj` is embedding, then state: so do vLLM
(deepseek_mtp.py) and SGLang (deepseek_nextn.py), which run the published weights. h_i is taken
after the main model's last norm: so do both of them, and acceptance of drafts falls where it is
not (vllm-project/vllm pull 47448, ROCm/ATOM pull 1764).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.models.decoder import Block, LayerInputs, StackInputs, run_stack
from dsjax.models.deepseek.config import DeepseekConfig
from dsjax.models.layers import Linear, RMSNorm
from dsjax.models.moe import RouterStats


class MTP(nnx.Module):
    """One module of depth 1; embedding and head are the main model's."""

    def __init__(self, config: DeepseekConfig, block: Block):
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(size, eps)
        self.hnorm = RMSNorm(size, eps)
        self.eh_proj = Linear(2 * size, size, (None, "embed"))
        self.block = block
        self.norm = RMSNorm(size, eps)

    def __call__(
        self,
        next_BTD: Float[Array, "B T D"],
        states_BTD: Float[Array, "B T D"],
        shared: StackInputs,
        remat: str,
    ) -> tuple[jax.Array, RouterStats | None]:
        """Run the module.

        Args:
            next_BTD: embedding of the token after each.
            states_BTD: the main model's, after its last norm.
            shared: of the layer; positions are those of the tokens, not of the next ones.
            remat: `training.gradient_checkpointing`.

        Returns:
            States [B, T, D] after `shared_head.norm`, and how the experts shared the work.
        """
        both_BTX = jnp.concatenate([self.enorm(next_BTD), self.hnorm(states_BTD)], axis=-1)
        own = LayerInputs(window=None, number=None, cache=None)
        x_BTD, _, work = run_stack(self.block, self.eh_proj(both_BTX), shared, own, remat)
        return self.norm(x_BTD), work
