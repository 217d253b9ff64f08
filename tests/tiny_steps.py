# SPDX-License-Identifier: Apache-2.0
"""Tiny models, batches and train steps without files: random weights by path, any mesh.

In: changes to a tiny config.json, an adapter's spec, config sections' keys. Out: a `Run`, on which
`step` takes optimizer steps, and batches as numpy arrays. Every random number depends on names and
seeds only, so runs on different meshes start equal. Not here: checkpoints (tests/tiny.py).
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax import adapters
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.method import AdapterConfig
from dsjax.config import MeshSection, RunConfig
from dsjax.data import Batch
from dsjax.distributed.mesh import AXES, make_mesh
from dsjax.distributed.sharding import Leaf, Params, leaf_shardings
from dsjax.models import build, predict_ahead
from dsjax.training.partition import make_partition, unflatten
from dsjax.training.state import StepConfig, StepReport, TrainState, init_state, step_config
from dsjax.training.step import make_train_step

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
"""What makes SHAPE a DeepSeek-V3 of a dense layer and two with experts."""

# Layers and experts differ: layer 1 has 2 and 5 of rank 3, layer 2 others of rank 2; no ups.
UNEVEN_EXPERTS = LoraConfig(
    r=2,
    lora_alpha=4,
    target_modules=["experts.2.gate_proj", "experts.5.gate_proj", "down_proj", "o_proj"],
    rank_pattern={r"layers\.1\.mlp\.experts\.\d\.gate_proj": 3},
    alpha_pattern={r"experts\.5\.gate_proj": 7},
)

PLAIN_ADAMW: dict[str, Any] = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": None,
    # Else Adam makes whole steps of a gradient's rounding where it is nearly zero.
    "adam_epsilon": 1e-3,
}


@dataclass
class Run:
    """A run's parts between two steps; `state` is donated to each step and replaced."""

    config: StepConfig
    state: TrainState
    frozen: Params
    compiled: Callable[..., tuple[TrainState, StepReport]] | None = None

    def step(self, batch: Batch) -> StepReport:
        """Take one optimizer step; the first one compiles, for batches of this shape."""
        if self.compiled is None:
            self.compile(batch)
        assert self.compiled is not None
        self.state, report = self.compiled(self.state, self.frozen, batch)
        return report

    def compile(self, batch: Batch, **options: Any) -> "Run":
        """Compile the step for batches of this shape, with XLA's options; returns the run."""
        self.compiled = self.lower(batch).compile(options)
        return self

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The step before XLA's compiler."""
        return make_train_step(self.config, self.state).lower(self.state, self.frozen, batch)

    def fresh(self) -> "Run":
        """The same compiled step on a copy of the present state."""
        return replace(self, state=jax.tree.map(jnp.copy, self.state))

    def trainable(self) -> dict[str, np.ndarray]:
        """The trained arrays, on the host."""
        return {path: np.array(array) for path, array in self.state.trainable.items()}

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients of the first step, from AdamW's first moment: it is (1 - beta1) of them."""
        assert int(self.state.step) == 1
        moments = self.state.opt_state[0].mu
        return {path: np.array(moment) / np.float32(0.1) for path, moment in moments.items()}


def model_of(**changes: Any) -> nnx.Module:
    """An abstract model that computes in float32."""
    return build(SHAPE | changes, "float32")


def random_array(path: str, leaf: Leaf, seed: int = 0) -> np.ndarray:
    """Values of one leaf, float32, none of them special: norms near 1, small weights."""
    rng = np.random.default_rng((seed, zlib.crc32(path.encode())))
    if path.endswith("norm.weight"):
        return rng.uniform(0.6, 1.6, leaf.shape).astype(np.float32)
    return rng.normal(0.0, 0.15, leaf.shape).astype(np.float32)


def start(
    shape: Mapping[str, Any] | None = None,
    adapter: AdapterConfig | None = None,
    mesh: Mapping[str, int] | None = None,
    model: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    values: Callable[[str, Leaf], np.ndarray] = random_array,
    objective: Mapping[str, Any] | None = None,
) -> Run:
    """Everything up to the first step.

    Args:
        shape: changes to SHAPE.
        adapter: what to attach; its arrays are random too, so that no gradient is zero.
        mesh: sizes of the mesh's axes, over that many devices; one device if None.
        model: keys of the `model` section.
        optimizer: changes to PLAIN_ADAMW.
        training: keys of the `training` section.
        values: start of a base or adapter leaf.
        objective: keys of the `objective` section.
    """
    config = run_config(model, optimizer, training, objective)
    module = build(SHAPE | (shape or {}), config.model.dtype)
    if config.objective.mtp_loss_weight:
        predict_ahead(module)
    adapters.attach(module, adapter)
    partition = make_partition(
        module,
        freeze=config.training.freeze,
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        balance=config.objective.bias_update_speed > 0,
    )
    section = MeshSection(**({"fsdp": 1} | (dict(mesh) if mesh else {})))
    devices = jax.devices()[: math.prod(getattr(section, axis) for axis in AXES)]
    parts = step_config(config, partition, make_mesh(section, devices), total_steps=100)
    shardings = leaf_shardings(partition.leaves, parts.mesh)
    params = {
        path: jax.device_put(
            _first_value(module, path, leaf, values).astype(leaf.dtype), shardings[path]
        )
        for path, leaf in partition.leaves.items()
    }
    state = init_state({path: params[path] for path in partition.trainable}, parts, seed=0)
    frozen = {path: params[path] for path in partition.frozen}
    return Run(parts, state, frozen)


def _first_value(
    model: nnx.Module, path: str, leaf: Leaf, values: Callable[[str, Leaf], np.ndarray]
) -> np.ndarray:
    """Random, but for buffers, and for a LoRA's rows beyond a layer's own rank: zero."""
    if not path.endswith(("lora_A", "lora_B")) and leaf.kind != "buffer":
        return values(path, leaf)
    *owner, name = path.split(".")
    module = model
    for part in owner:
        module = getattr(module, part)
    if leaf.kind == "buffer":
        return np.float32(getattr(module, name).get_metadata()["values"]).reshape(leaf.shape)
    rank = leaf.shape[-2 if path.endswith("lora_A") else -1]
    own = np.arange(rank) < np.asarray(module.ranks)[:, None]  # [L, r], of experts [L * E, r]
    own = own.reshape(*leaf.shape[:-2], rank)
    return values(path, leaf) * (own[..., None] if path.endswith("lora_A") else own[..., None, :])


def run_config(
    model: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A configuration of which only these sections mean anything."""
    return RunConfig(
        model={"path": "none", "dtype": "float32"} | dict(model or {}),
        data={"train": ["none"]},
        optimizer=PLAIN_ADAMW | dict(optimizer or {}),
        training={"gradient_accumulation_steps": 1} | dict(training or {}),
        objective=dict(objective or {}),
        output_dir="none",
    )


def batch(
    rows: int = 8, length: int = 24, vocab_size: int = 64, seed: int = 0, packed: bool = True
) -> Batch:
    """Random rows of different lengths, padded; packed ones hold two segments; uneven weights."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, (rows, length), dtype=np.int32)
    targets = rng.integers(0, vocab_size, (rows, length), dtype=np.int32)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], (rows, length)).astype(np.float32)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        end = int(rng.integers(length // 2, length + 1))
        cut = int(rng.integers(2, end - 2)) if packed else end
        for number, (first, last) in enumerate([(0, cut), (cut, end)], start=1):
            segments[row, first:last] = number
            positions[row, first:last] = np.arange(last - first)
    real = segments > 0
    return Batch(ids * real, targets * real, weights * real, segments, positions)


def full_model(run: Run) -> nnx.Module:
    """The run's model with its present values."""
    return unflatten(run.config.partition.graphdef, {**run.frozen, **run.state.trainable})


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm of `theirs`."""
    size = float(np.linalg.norm(theirs))
    return float(np.linalg.norm(ours - theirs)) / (size or 1.0)


class Outcome(NamedTuple):
    """What two steps give: loss and gradients of the first, the trained arrays after the second."""

    loss: float
    gradients: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]


def two_steps(run: Run, vocab_size: int = 64, packed: bool = True) -> Outcome:
    """Take two steps of a fresh run."""
    report = run.step(batch(vocab_size=vocab_size, packed=packed))
    gradients = run.gradients()
    run.step(batch(vocab_size=vocab_size, packed=packed, seed=1))
    return Outcome(float(report.sums["loss"]), gradients, run.trainable())


def assert_same(found: Outcome, expected: Outcome, bound: float = 1e-5) -> None:
    """Two runs took the same steps, up to rounding; no gradient is zero."""
    assert abs(found.loss - expected.loss) < bound * abs(expected.loss)
    assert set(found.gradients) == set(expected.gradients)
    for path, gradient in expected.gradients.items():
        assert np.linalg.norm(gradient) > 0, path
        assert distance(found.gradients[path], gradient) < bound, path
        assert distance(found.trained[path], expected.trained[path]) < bound, path
