# SPDX-License-Identifier: Apache-2.0
"""The library's calls on a model: load it, generate with it, save it.

In: a Hugging Face checkpoint and perhaps a PEFT adapter. Out: a callable NNX module that generates;
and back. Not done here: anything that these steps do themselves (`training.setup`, `decoding`,
`export`).
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dsjax.adapters import check_form
from dsjax.config import AdapterSection, MeshSection, ModelSection
from dsjax.config.sections import QUANTIZATIONS
from dsjax.data import find_tokenizer, load_tokenizer
from dsjax.decoding.decode import generate, length_warnings
from dsjax.decoding.detokenizer import TextBatch, TextStream
from dsjax.decoding.prompts import read_prompts
from dsjax.distributed.mesh import make_mesh, normalize_mesh
from dsjax.errors import ConfigError
from dsjax.export.merge import changed_tensors
from dsjax.export.peft import write_peft
from dsjax.models import Model
from dsjax.models.changes import compose
from dsjax.training.partition import flatten
from dsjax.training.setup import Assembly, assemble_model, load_frozen, load_trainable
from dsjax.weights.folders import atomic_directory, check_apart, check_empty
from dsjax.weights.generation_config import stop_tokens
from dsjax.weights.write import write_checkpoint


def load_pretrained(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    *,
    quantization: str | None = None,
    quantization_double: bool = False,
    quantization_experts: bool = True,
    quantization_skip_modules: Sequence[str] = (),
) -> Model:
    """Load a model, and a PEFT adapter if one is given; calling it gives float32 logits.

    It has the checkpoint's `tokenizer`, and `generate` and `save_pretrained` as methods.

    Args:
        path: Hugging Face directory, hub id, or a directory written by `to-flax`.
        adapter: PEFT adapter's folder.
        dtype: what weights are held in and activations are computed in.
        mesh: devices to shard over, axes among `sharding.AXES`; the first device if None.
        quantization: how the weights of linear maps are held, `nf4`, `int8` or `fp8`; None: in
            `dtype`.
        quantization_double: whether nf4's scales are quantized, too.
        quantization_experts: whether routed experts' are held so, too.
        quantization_skip_modules: modules whose weights are not.

    Returns:
        `model(input_ids)`: [B, T] -> float32 [B, T, V]; lists and arrays of numpy and torch are
        taken as well.

    Raises:
        ConfigError: the checkpoint or the adapter is wrong or not supported.
    """
    for name, folder in {"path": path, "adapter": adapter}.items():
        if folder is not None and not os.fspath(folder):
            raise ConfigError(f"{name}: got an empty text, expected a folder or a hub id")
    if mesh is None:
        mesh = make_mesh(MeshSection(fsdp=1), jax.devices()[:1])
    mesh = normalize_mesh(mesh)
    _check_one_of("dtype", dtype, "bfloat16", "float32", "float16")
    _check_one_of("quantization", quantization, None, *QUANTIZATIONS)
    section = ModelSection.model_validate(
        {
            "path": str(path),
            "dtype": dtype,
            "quantization": quantization,
            "quantization_double": quantization_double,
            "quantization_experts": quantization_experts,
            "quantization_skip_modules": list(quantization_skip_modules),
        }
    )
    wanted = AdapterSection() if adapter is None else AdapterSection(path=str(adapter))
    setup = assemble_model(section, wanted, [], mesh)
    if setup.spec is None:
        setup = replace(setup, partition=setup.partition.for_inference(dtype))
    frozen = load_frozen(setup, 0)
    model = setup.partition.merge(load_trainable(setup, frozen, 0), frozen)
    model.origin = CheckpointOrigin(setup)
    return model


def _check_one_of(name: str, value: Any, *choices: str | None) -> None:
    if value not in choices:
        *others, last = map(str, choices)
        raise ConfigError(f"{name}: got {value!r}, expected {', '.join(others)} or {last}")


@dataclass(frozen=True, eq=False, repr=False)
class CheckpointOrigin:
    """What a model was loaded from, and what can be done with it therefore.

    Attributes:
        setup: its assembly.
    """

    setup: Assembly

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.setup.source.directory)

    def read_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the checkpoint's tokenizer; it is read once."""
        return self._tokenizer

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Return the tokens that end an answer; a checkpoint of tokens alone has no tokenizer."""
        source = self.setup.source
        return stop_tokens(source, find_tokenizer(source.directory, "auto"))

    def generate(
        self,
        model: Model,
        prompts: Any,
        *,
        max_new_tokens: int,
        stop: Sequence[str],
        **sampling: Any,
    ) -> Any:
        """Continue prompts; `Loaded.generate` says how."""
        asked = read_prompts(prompts, self.read_tokenizer)
        if isinstance(stop, str) or "" in stop or (stop and not asked.as_text):
            raise ConfigError(
                f"stop: got {stop!r}, expected a list of texts, none of them empty, and prompts "
                "that are texts or conversations"
            )
        limit = model.config.max_position_embeddings
        for line in length_warnings(asked.input_ids, max_new_tokens, limit):
            print(line, file=sys.stderr)
        streamed = asked.input_ids if asked.as_text else []
        texts = TextBatch(
            [TextStream(self._tokenizer, ids, stop) for ids in streamed], self.stop_ids
        )
        rows = generate(
            model,
            asked.input_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            on_token=texts.take if asked.as_text else None,
            **sampling,
        )
        endless = [row for row, ids in enumerate(rows) if ids[-1] not in self.stop_ids]
        for row in texts.close() if asked.as_text else endless:
            print(f"prompt {row + 1}: cut at {max_new_tokens} new tokens", file=sys.stderr)
        answers = texts.texts if asked.as_text else rows
        return answers[0] if asked.one else answers

    def save_pretrained(self, model: Model, directory: str | os.PathLike[str], format: str) -> None:
        """Save a model: `dsjax.save_pretrained`."""
        save_pretrained(model, directory, format)


def save_pretrained(
    model: Model, directory: str | os.PathLike[str], format: str = "merged"
) -> None:
    """Save a model that `load_pretrained` gave, with the values that it has now.

    Matrices that it holds quantized are written as they are in its checkpoint, and an adapter is
    merged into those.

    Args:
        model: the model.
        directory: a new or empty folder.
        format: `merged` for a checkpoint that transformers loads, `peft` for the adapter alone.

    Raises:
        ConfigError: the folder is in use, or the model has no such form.
    """
    assert isinstance(model.origin, CheckpointOrigin), "not a model of load_pretrained"
    setup = model.origin.setup
    directory = os.fspath(directory)
    sources = {"the model's folder": setup.section.path, "the adapter's": setup.adapter_path}
    check_empty(directory, "directory")
    check_apart(directory, "directory", sources)
    if format not in ("merged", "peft"):
        raise ConfigError(f"format: got {format!r}, expected merged or peft")
    check_form(setup.model, setup.spec, format, "format")
    params = flatten(model)
    adapter = {path: params[path] for path in setup.partition.trainable}
    with atomic_directory(
        Path(directory), "directory", check=lambda: check_empty(directory, "directory")
    ) as folder:
        if format == "peft":
            write_peft(folder, setup, adapter)
        else:
            own = {p: x for p, x in params.items() if not setup.partition.leaves[p].quantized}
            changes = changed_tensors(setup.model, None, own, {})
            if setup.spec is not None:
                merged = changed_tensors(setup.model, setup.spec, adapter, {})
                changes |= {
                    name: compose(changes[name], update) if name in changes else update
                    for name, update in merged.items()
                }
            write_checkpoint(setup.source, folder, changes)
