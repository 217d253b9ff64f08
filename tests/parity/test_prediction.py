# SPDX-License-Identifier: Apache-2.0
"""The loss of the token after the next, and all gradients, are those of a module written in torch.

The reference takes every segment of the packed rows by itself, with transformers' own layer.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepseek_variants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
import tiny_steps
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32DecoderLayer

from dsjax.config import AdapterSection, MeshSection, ModelSection, ObjectiveSection
from dsjax.data import Batch
from dsjax.distributed.mesh import make_mesh
from dsjax.models import entries_of
from dsjax.training.setup import Assembly, assemble_model, load_frozen, load_trainable
from dsjax.training.state import init_state, step_config

pytestmark = pytest.mark.parity

BOUND, WEIGHT, VOCABULARY = 1e-4, 0.3, 288
LAYERS = {"deepseek_v3": DeepseekV3DecoderLayer, "deepseek_v32": DeepseekV32DecoderLayer}
VARIANTS = {
    "deepseek_v3": ("deepseek_v3_mtp", {"num_nextn_predict_layers": 1}),
    "deepseek_v32": ("deepseek_v32_dense", {}),
}


class Module(nn.Module):
    """enorm and hnorm, eh_proj, one layer, a norm: the file's names but for `layer` and `norm`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        config = model.config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = DeepseekV3RMSNorm(size, eps), DeepseekV3RMSNorm(size, eps)
        self.norm = DeepseekV3RMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        # The number only says that the layer has experts.
        self.layer = LAYERS[config.model_type](config, config.num_hidden_layers - 1)

    def forward(self, model: nn.Module, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of ids[2:], from the states and ids of one segment."""
        embedded = model.get_input_embeddings()(ids[1:])[None]
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(states[:, :-1])], dim=-1))
        count = x.shape[1]
        places = torch.arange(count)[None]
        hidden_later = torch.full((count, count), torch.finfo(x.dtype).min).triu(1)
        x = self.layer(
            x,
            attention_mask=hidden_later[None, None],
            position_ids=places,
            position_embeddings=model.model.rotary_emb(x, places),
        )
        return model.lm_head(self.norm(x if torch.is_tensor(x) else x[0]))[0]


def _name_on_disk(name: str, layer: int) -> str:
    """The file's name of a parameter of `Module`."""
    name = re.sub(r"^layer\.", "", re.sub(r"^norm\.", "shared_head.norm.", name))
    return f"model.layers.{layer}.{name}"


def _named(model: nn.Module, module: Module) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Name on disk, value and gradient of every tensor of both."""
    yield from deepseek_variants.file_tensors(model)
    layer = model.config.num_hidden_layers
    for name, value, gradient in deepseek_variants.file_tensors(module):
        yield _name_on_disk(name, layer), value, gradient


def _reference(checkpoint: Path) -> tuple[nn.Module, Module]:
    model = tiny.reference_model(checkpoint)
    module = Module(model).eval()
    found = runs.read_tensors(checkpoint)
    with torch.no_grad():
        for name, value, _ in _named(model, module):
            value.copy_(found[name])  # a view of the parameter
    return model, module


def _segments(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, targets and weights of every segment."""
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, segments.max() + 1):
            at = np.nonzero(segments == segment)[0]
            arrays = (batch.input_ids, batch.targets, batch.loss_weights)
            yield tuple(torch.tensor(np.asarray(x)[row, at]) for x in arrays)


def _losses(model: nn.Module, module: Module, batch: Batch) -> list[torch.Tensor]:
    """Mean loss of the next token, mean loss of the one after."""
    sums = [[torch.zeros(()), torch.zeros(())] for _ in range(2)]
    for ids, targets, weights in _segments(batch):
        states = model.model(ids.long()[None], use_cache=False).last_hidden_state
        pairs = [(model.lm_head(states)[0], targets, weights)]
        if len(ids) > 1:
            pairs.append((module(model, states, ids.long()), targets[1:], weights[1:]))
        for total, (logits, target, weight) in zip(sums, pairs, strict=False):
            losses = nn.functional.cross_entropy(logits, target.long(), reduction="none")
            total[0] = total[0] + (losses * weight).sum()
            total[1] = total[1] + weight.sum()
    return [loss / weight for loss, weight in sums]


def _run(checkpoint: Path, remat: str) -> tuple[tiny_steps.Run, Assembly]:
    objective = ObjectiveSection(mtp_loss_weight=WEIGHT)
    mesh = make_mesh(MeshSection(fsdp=1), jax.devices()[:1])
    section = ModelSection(path=str(checkpoint), dtype="float32")
    setup = assemble_model(section, AdapterSection(), [], mesh, objective)
    training = {"gradient_checkpointing": remat}
    config = tiny_steps.run_config(training=training, objective={"mtp_loss_weight": WEIGHT})
    step = step_config(config, setup.partition, mesh, total_steps=10)
    frozen = load_frozen(setup, 0)
    state = init_state(load_trainable(setup, frozen, 0), step, 0)
    return tiny_steps.Run(step, state, frozen), setup


def _batch() -> Batch:
    """Packed rows, one of which ends in a segment of a single token."""
    batch = tiny_steps.batch(rows=3, vocab_size=VOCABULARY)
    last = int((batch.segment_ids[0] > 0).sum()) - 1
    batch.segment_ids[0, last], batch.position_ids[0, last] = 3, 0
    return batch


def _remove(checkpoint: Path, name: str) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "remat"), [("deepseek_v3", "full"), ("deepseek_v32", "none")])
def test_losses_and_gradients_are_those_of_torch(kind: str, remat: str, tmp_path: Path) -> None:
    variant, changes = VARIANTS[kind]
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant, mtp=1, **changes)
    if kind == "deepseek_v3":  # the module's copies of embedding and head may be absent
        _remove(checkpoint, "model.layers.3.embed_tokens.weight")
        _remove(checkpoint, "model.layers.3.shared_head.head.weight")
    batch = _batch()
    model, module = _reference(checkpoint)
    plain, ahead = _losses(model, module, batch)
    (plain + WEIGHT * ahead).backward()

    run, setup = _run(checkpoint, remat)
    sums = run.step(jax.tree.map(jnp.asarray, batch)).sums

    assert float(sums["loss"] / sums["weight"]) == pytest.approx(plain.item(), rel=1e-6)
    ours = float(sums["mtp_loss"] / sums["mtp_weight"])
    assert ours == pytest.approx(ahead.item(), rel=1e-6)
    expected = {name: gradient for name, _, gradient in _named(model, module)}
    entries = [entry for entry in entries_of(setup.model) if not entry.copy]
    assert {entry.hf for entry in entries} == set(expected)
    gradients = run.gradients()
    for entry in entries:
        theirs = expected[entry.hf]
        if theirs is None:
            assert any(part in entry.hf for part in deepseek_variants.NEVER_TRAINED), entry.hf
            continue
        ours = torch.tensor(gradients[entry.path][entry.index])
        error, size = (float(torch.linalg.vector_norm(x)) for x in (ours - theirs, theirs))
        assert error <= BOUND * size, (entry.hf, error, size)
        if ".experts." not in entry.hf:
            assert size > 0, entry.hf
