# SPDX-License-Identifier: Apache-2.0
"""The library's two calls: load a model, save a model.

In: a Hugging Face checkpoint and perhaps a PEFT adapter. Out: a callable NNX module; and back. Not
done here: anything that those two steps do themselves (`training.setup`, `export`).
"""

from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from dsjax.adapters import check_form
from dsjax.config import AdapterSection, MeshSection, ModelSection
from dsjax.distributed.mesh import make_mesh, normalize_mesh
from dsjax.errors import ConfigError
from dsjax.export.merge import changed_tensors
from dsjax.export.peft import write_peft
from dsjax.models import Model
from dsjax.models.changes import compose
from dsjax.training.partition import flatten
from dsjax.training.setup import assemble_model, load_frozen, load_trainable
from dsjax.weights.folders import atomic_directory, check_apart, check_empty
from dsjax.weights.write import write_checkpoint


def load_pretrained(
    path: str,
    adapter: str | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
) -> Model:
    """Load a model, and a PEFT adapter if one is given; calling it gives float32 logits.

    Args:
        path: Hugging Face directory, hub id, or a directory written by `to-flax`.
        adapter: PEFT adapter's folder.
        dtype: what weights are held in and activations are computed in.
        mesh: devices to shard over, axes among `sharding.AXES`; the first device if None.

    Returns:
        `model(input_ids)`: int32 [B, T] -> float32 [B, T, V].

    Raises:
        ConfigError: the checkpoint or the adapter is wrong or not supported.
    """
    if mesh is None:
        mesh = make_mesh(MeshSection(fsdp=1), jax.devices()[:1])
    mesh = normalize_mesh(mesh)
    if dtype not in ("bfloat16", "float32", "float16"):
        raise ConfigError(f"dtype: got {dtype!r}, expected bfloat16, float32 or float16")
    section = ModelSection.model_validate({"path": str(path), "dtype": dtype})
    wanted = AdapterSection(path=str(adapter)) if adapter else AdapterSection()
    setup = assemble_model(section, wanted, [], mesh)
    if setup.spec is None:
        setup = replace(setup, partition=setup.partition.for_inference(dtype))
    model = setup.partition.merge(load_trainable(setup, 0), load_frozen(setup, 0))
    model.origin = setup
    return model


def save_pretrained(model: Model, directory: str, format: str = "merged") -> None:
    """Save a model that `load_pretrained` gave, with the values that it has now.

    Args:
        model: the model.
        directory: a new or empty folder.
        format: `merged` for a checkpoint that transformers loads, `peft` for the adapter alone.

    Raises:
        ConfigError: the folder is in use, or the model has no such form.
    """
    setup = model.origin
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
            changes = changed_tensors(setup.model, None, params, {})
            if setup.spec is not None:
                merged = changed_tensors(setup.model, setup.spec, adapter, {})
                changes |= {name: compose(changes[name], update) for name, update in merged.items()}
            write_checkpoint(setup.source, folder, changes)
