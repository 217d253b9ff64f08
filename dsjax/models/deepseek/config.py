# SPDX-License-Identifier: Apache-2.0
"""Hyper-parameters of DeepSeek's own architectures, read from a checkpoint's config.json.

In: the parsed config.json of model_type deepseek, deepseek_v2, deepseek_v3 or deepseek_v32, in the
hub's dialect or transformers 5's. Out: a `DeepseekConfig`, or one ConfigError that names every
field that is missing, impossible or would change the numbers in a way that is not implemented.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsjax.errors import raise_all
from dsjax.models.config_checks import (
    count_problems,
    expert_problems,
    flag_problems,
    head_problems,
    names_problems,
    number_problems,
    only_problems,
    shown,
)
from dsjax.models.moe import RouterConfig
from dsjax.models.rope import Rope, rope_from_config, rope_settings

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
_MLA_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_INDEX_SIZES = ("index_n_heads", "index_head_dim", "index_topk")
_ONLY = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
}
_FLAGS = ("attention_bias", "mlp_bias", "norm_topk_prob", "rope_interleave", "tie_word_embeddings")

_SCORING = {"deepseek": "softmax", "deepseek_v2": "softmax"}
"""model_type -> its scoring function; sigmoid for the others."""

_TOPK = {"deepseek": ("greedy",), "deepseek_v2": ("greedy", "group_limited_greedy")}
"""model_type -> what its topk_method may be, the default first; noaux_tc for the others."""

_V3 = {
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "num_nextn_predict_layers": 1,
    "rope_interleave": True,  # read by V3 alone: the others always are
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek": {"max_position_embeddings": 2048, "topk_method": "greedy"},
    "deepseek_v2": {
        "max_position_embeddings": 2048,
        "n_shared_experts": 2,
        "topk_method": "greedy",
        "q_lora_rank": 1536,
    },
    "deepseek_v3": _V3,
    "deepseek_v32": _V3 | {"max_position_embeddings": 163840},
}
"""model_type -> what the reference class takes for a key that is absent."""

LATENT_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says: so does the reference."""


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention, under Hugging Face's names."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool
    rope_in_float32: bool
    softmax_scale: float


@dataclass(frozen=True)
class Indexer:
    """Sizes of V3.2's indexer, which chooses the keys that a query attends to."""

    index_n_heads: int
    index_head_dim: int
    index_topk: int


@dataclass(frozen=True)
class DeepseekConfig:
    """Fields under Hugging Face's names; `mla` is None for MoE-16B, whose attention is Llama's."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    first_k_dense_replace: int
    moe_intermediate_size: int
    n_shared_experts: int
    num_nextn_predict_layers: int
    router: RouterConfig
    rope: Rope
    mla: Latent | None
    indexer: Indexer | None

    qk_norm = False

    @property
    def dense_layers(self) -> int:
        """Number of layers before the first with experts."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Size of a query's head and of a value's head."""
        m = self.mla
        if m is None:
            return self.head_dim, self.head_dim
        return m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer: how many positions a token looks back over; here always all."""
        return (None,) * self.num_hidden_layers

    @property
    def qkv_bias(self) -> bool:
        """Whether MoE-16B's q, k and v projections have biases."""
        return self.attention_bias

    @property
    def o_bias(self) -> bool:
        """Whether MoE-16B's output projection has a bias."""
        return self.attention_bias


def parse_config(config: Mapping[str, Any]) -> DeepseekConfig:
    """Read a config.json; absent optional fields take the reference class's default.

    Raises:
        ConfigError: with a line for every field that is wrong.
    """
    kind = config["model_type"]
    config = {**_DEFAULTS[kind], **config}
    _check(config)
    is_latent = kind != "deepseek"
    heads = config["num_attention_heads"]
    head_dim = config["qk_rope_head_dim"] if is_latent else config["hidden_size"] // heads
    parsed = DeepseekConfig(
        model_type=kind,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=config["max_position_embeddings"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")) and kind in ("deepseek", "deepseek_v2"),
        first_k_dense_replace=config.get("first_k_dense_replace") or 0,
        moe_intermediate_size=config["moe_intermediate_size"],
        n_shared_experts=config.get("n_shared_experts") or 0,
        num_nextn_predict_layers=config.get("num_nextn_predict_layers") or 0,
        router=_router(config),
        rope=rope_from_config(config, head_dim),
        mla=_latent(config) if is_latent else None,
        indexer=_indexer(config) if kind == "deepseek_v32" else None,
    )
    _check_parsed(parsed, config)
    return parsed


def _router(config: Mapping[str, Any]) -> RouterConfig:
    kind = config["model_type"]
    return RouterConfig(
        n_routed_experts=config["n_routed_experts"],
        num_experts_per_tok=config["num_experts_per_tok"],
        scoring_func=_SCORING.get(kind, "sigmoid"),
        topk_method=config.get("topk_method") or _TOPK.get(kind, ("noaux_tc",))[0],
        n_group=config.get("n_group") or 1,
        topk_group=config.get("topk_group") or 1,
        norm_topk_prob=bool(config.get("norm_topk_prob")),
        routed_scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
    )


def _latent(config: Mapping[str, Any]) -> Latent:
    older = config["model_type"] == "deepseek_v2"
    sizes = {name: config[name] for name in _MLA_SIZES}
    return Latent(
        q_lora_rank=config.get("q_lora_rank"),
        **sizes,
        rope_interleave=config["model_type"] != "deepseek_v3" or bool(config["rope_interleave"]),
        rope_in_float32=older,
        softmax_scale=_softmax_scale(config, sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]),
    )


def _softmax_scale(config: Mapping[str, Any], head_dim: int) -> float:
    """1 / sqrt(head size), times yarn's gain squared wherever the rope is scaled."""
    _, settings = rope_settings(config)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    scale = head_dim**-0.5
    gain = settings.get("mscale_all_dim")
    if kind == "default" or not gain or settings.get("factor", 1) <= 1:
        return scale
    return scale * (0.1 * gain * math.log(settings["factor"]) + 1.0) ** 2


def _indexer(config: Mapping[str, Any]) -> Indexer:
    return Indexer(**{name: config[name] for name in _INDEX_SIZES})


def _check(config: Mapping[str, Any]) -> None:
    kind = config["model_type"]
    required = [*_SIZES, *(_MLA_SIZES if kind != "deepseek" else ())]
    if kind == "deepseek_v32":
        required += ["q_lora_rank", *_INDEX_SIZES]
    required.append("max_position_embeddings")
    optional = ("num_key_value_heads", "q_lora_rank", "n_group")
    zeros = ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
    only = _ONLY | {"scoring_func": _SCORING.get(kind, "sigmoid")}
    if kind == "deepseek_v2":
        only |= {"norm_topk_prob": False}  # the two references disagree on what true means
    problems = [
        *count_problems(config, required, [*optional, "topk_group"]),
        *count_problems(config, [], zeros, least=0),
        *only_problems(config, only),
        *flag_problems(config, _FLAGS),
        *number_problems(config, ["rms_norm_eps", "routed_scaling_factor"]),
        *names_problems(config, "mlp_layer_types"),
    ]
    methods = _TOPK.get(kind, ("noaux_tc",))
    if config.get("topk_method") not in (None, *methods):
        problems.append(
            f"config.json topk_method: got {shown(config['topk_method'])}, expected "
            f"{' or '.join(methods)} for model_type {kind}"
        )
    raise_all(problems)
    raise_all([*expert_problems(config), *head_problems(config)])


def _check_parsed(config: DeepseekConfig, source: Mapping[str, Any]) -> None:
    problems, router = [], config.router
    experts, groups = router.n_routed_experts, router.n_group
    if experts % groups:
        problems.append(
            f"config.json n_group: got {groups}, expected a divisor of n_routed_experts ({experts})"
        )
    elif router.topk_method == "noaux_tc" and experts // groups < 2:
        problems.append(
            f"config.json n_group: got {groups}, expected at least 2 of the {experts} experts "
            "(n_routed_experts) in each group"
        )
    if router.topk_group > groups:
        problems.append(
            f"config.json topk_group: got {router.topk_group}, expected at most n_group ({groups})"
        )
    room = experts if router.topk_method == "greedy" else experts // groups * router.topk_group
    if router.num_experts_per_tok > room:
        problems.append(
            f"config.json num_experts_per_tok: got {router.num_experts_per_tok}, expected at most "
            f"the {room} experts that a token may choose from (n_routed_experts, n_group, "
            "topk_group)"
        )
    if router.topk_method != "greedy":
        problems += [
            f"config.json {name}: got null, expected an integer >= 1 for topk_method "
            f"{router.topk_method}"
            for name in ("n_group", "topk_group")
            if not source.get(name)
        ]
    if config.num_attention_heads % config.num_key_value_heads or (
        config.mla is not None and config.num_key_value_heads != config.num_attention_heads
    ):
        problems.append(
            f"config.json num_key_value_heads: got {config.num_key_value_heads}, expected "
            f"num_attention_heads ({config.num_attention_heads})"
        )
    problems += _layer_type_problems(config, source)
    if config.indexer and config.indexer.index_head_dim < config.head_dim:
        problems.append(
            f"config.json index_head_dim: got {config.indexer.index_head_dim}, expected at least "
            f"qk_rope_head_dim ({config.head_dim})"
        )
    raise_all(problems)


def _layer_type_problems(config: DeepseekConfig, source: Mapping[str, Any]) -> list[str]:
    """Say where transformers' own list of dense layers differs from first_k_dense_replace."""
    dense, layers = config.dense_layers, config.num_hidden_layers
    expected = ["dense"] * dense + ["sparse"] * (layers - dense)
    given = source.get("mlp_layer_types")
    if given is None or given == expected:
        return []
    return [
        f"config.json mlp_layer_types: got {shown(given)}, expected {dense} times dense, then "
        "sparse, as first_k_dense_replace says"
    ]
