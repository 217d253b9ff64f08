# SPDX-License-Identifier: Apache-2.0
"""The last check of a merged export: with what was written, it gives the trained model's logits.

In: the trained arrays, and the folder that was written. Out: nothing, or an error. Merged weights
are rounded to the file's dtype. Where that moves the logits further than usual, the model itself
says what is right: how far they move when its activations are rounded likewise. So a wrong merge is
found where it moves logits further than rounding does; after a very small update it is not. Not
done here: comparing the tensors with what was meant (`weights.write`).
"""

from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax import adapters
from dsjax.config import AdapterSection, ModelSection
from dsjax.distributed.mesh import batch_shards, length_multiple, replicated
from dsjax.distributed.sharding import Params, make_layout
from dsjax.export.layerwise import Variant, layerwise_logits
from dsjax.models import build, entries_of
from dsjax.training.setup import Assembly, assemble_model
from dsjax.weights.fp8 import FP8, raw_of
from dsjax.weights.load import load_base

TOKENS = 32
ROUNDING = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05, FP8.name: 0.5}
"""How far rounding the changed weights to a dtype may move the logits in any case.

Unrelated logits are about 1.4 apart. FP8 blocks in a tiny random V3's attention: 0.25.
"""

SLACK = 4.0
"""How many times what rounding the activations does, rounding the changed weights may do."""

LEAST = 1e-5
"""Of the logits' norm: by so much float32 rounds them, and a run that moved them less learnt
nothing that could be kept."""

LITTLE_MEMORY = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,"
    "while-loop-expensive-invariant-code-motion",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
"""Trap: XLA for CPU computes bfloat16 products in float32, and would convert all layers of a stack
before its loop begins: twice the model's size. Nor need a layer's matrices be there all at once."""


class DifferentLogitsError(RuntimeError):
    """What was written is not the trained model."""


def prove(
    setup: Assembly, trainable: Params, frozen: Params, directory: str, changed: Set[str]
) -> float | None:
    """Put what changed into the model as a user would load it: its logits must be the trained ones.

    The base comes between the two, of the arrays that are there, and of the source's for those that
    trained. Tensors that did not change were read back and compared, so their arrays serve again;
    all others are given up before the next ones are loaded, so that there is never more than one
    model.

    Args:
        setup: the run's model.
        trainable: the trained arrays.
        frozen: all other arrays.
        directory: the merged checkpoint, or its URL.
        changed: names of its tensors that training changed.

    Returns:
        `kept` of the logits; None also where the file's numbers are finer than the run's, and so
        take nothing away, whereas the run's own rounding of the base would count as a loss.

    Raises:
        DifferentLogitsError: the logits are further apart than rounding explains.
    """
    if setup.section.quantization is not None:
        return _prove_layerwise(setup, trainable, frozen, directory, changed)
    trained = sample_logits(setup, trainable, frozen, "float32")
    held = dict(trainable) | dict(frozen)
    base, arrays = _loaded(setup, setup.section, held, set(trainable))
    before = sample_logits(base, {}, arrays, "float32")
    section = setup.section.model_copy(update={"path": directory, "revision": None})
    touched = {entry.path for entry in entries_of(base.model) if entry.hf in changed}
    merged, arrays = _loaded(setup, section, arrays, touched)
    found = _judge(
        merged, changed, partial(sample_logits, merged, {}, arrays), trained=trained, before=before
    )
    for array in arrays.values():
        array.delete()
    return found


def _prove_layerwise(
    setup: Assembly, trainable: Params, frozen: Params, directory: str, changed: Set[str]
) -> float | None:
    """Prove what was merged into the checkpoint's own weights, where training had quantized ones.

    So the trained model is, here, the adapter over these weights. They may not fit on the devices.
    """
    leaves = setup.partition.leaves
    for path, array in frozen.items():
        if leaves[path].kind == "base":
            array.delete()
    adapter = {
        path: array for path, array in (frozen | trainable).items() if leaves[path].kind != "base"
    }
    section = setup.section.model_copy(update={"quantization": None})
    base, plain = _unquantized(setup, section)
    model = build(base.source.config, section.dtype)
    adapters.attach(model, setup.spec)
    both, ids = [plain, replace(plain, model=model, adapter=adapter)], sample_ids(setup)
    before, trained = layerwise_logits(base.source, both, setup.mesh, ids, "float32")
    section = section.model_copy(update={"path": directory, "revision": None})
    merged, alone = _unquantized(setup, section)

    def logits_of(dtype: str) -> Float[np.ndarray, "T V"]:
        return layerwise_logits(merged.source, [alone], setup.mesh, ids, dtype)[0]

    return _judge(merged, changed, logits_of, trained=trained, before=before)


def _unquantized(setup: Assembly, section: ModelSection) -> tuple[Assembly, Variant]:
    """Open a checkpoint as an unquantized model is opened; its arrays are not loaded."""
    opened = assemble_model(section, AdapterSection(), [], setup.mesh)
    leaves = opened.partition.for_inference(section.dtype).leaves
    return opened, Variant(opened.model, leaves, {})


def _loaded(
    setup: Assembly, section: ModelSection, held: Params, other: Set[str]
) -> tuple[Assembly, Params]:
    """Load a checkpoint as a user would, with the arrays that are there.

    Args:
        setup: the run's model.
        section: which checkpoint.
        held: arrays on the devices; what does not serve again is given up.
        other: paths of those that hold something else.
    """
    loaded = assemble_model(section, AdapterSection(), [], setup.mesh)
    loaded = replace(loaded, partition=loaded.partition.for_inference(setup.section.dtype))
    leaves = loaded.partition.leaves
    serves = {
        path: array
        for path, array in held.items()
        if path in leaves and path not in other and array.dtype == leaves[path].dtype
    }
    for path, array in held.items():
        if path not in serves:
            array.delete()
    missing = {path: leaf for path, leaf in leaves.items() if path not in serves}
    return loaded, serves | load_base(loaded.source, loaded.model, missing, loaded.shardings)


def kept(
    exported: Float[np.ndarray, "T V"],
    trained: Float[np.ndarray, "T V"],
    base: Float[np.ndarray, "T V"],
) -> float | None:
    """Measure what is left of the training: 1 - |exported - trained| / |trained - base|.

    1 is all of it, 0 is as far from the trained model as the base is. Each distance is the middle
    token's (`distance`): of a few tokens that went to other experts, one would decide alone. None
    where training moved the logits by no more than float32 rounds them. To three decimals, in which
    all meshes agree.
    """
    learnt = distance(base, trained)
    return None if learnt <= LEAST else round(1.0 - distance(exported, trained) / learnt, 3)


def _judge(
    merged: Assembly,
    changed: Set[str],
    logits_of: Callable[[str], Float[np.ndarray, "T V"]],
    *,
    trained: Float[np.ndarray, "T V"],
    before: Float[np.ndarray, "T V"],
) -> float | None:
    """Hold the logits of what was written against the trained model's; returns `kept` of them.

    Args:
        merged: what was written.
        changed: names of its tensors that training changed.
        logits_of: dtype of activations -> its logits.
        trained: those of the trained model.
        before: those of the base.
    """
    held, written = merged.section.dtype, raw_of(merged.source).tensors
    dtypes = {i.dtype.name for n, i in written.items() if n in changed} & ROUNDING.keys()
    coarsest = max(dtypes | {held}, key=ROUNDING.__getitem__)
    logits = logits_of("float32")
    found, bound = distance(logits, trained), ROUNDING[coarsest]
    if found > bound and coarsest != "float32":
        rounded = logits_of("bfloat16" if coarsest == FP8.name else coarsest)
        bound = min(1.0, max(bound, SLACK * distance(rounded, logits)))
    if not found <= bound:
        raise DifferentLogitsError(
            f"{merged.source.directory}: logits differ from the trained model's by {found:.3g} of "
            f"their norm, expected at most {bound:.3g}"
        )
    if all(ROUNDING[name] < ROUNDING[held] for name in dtypes):
        return None
    return kept(logits, trained, before)


def distance(logits: Float[np.ndarray, "T V"], expected: Float[np.ndarray, "T V"]) -> float:
    """Return the median over tokens of |logits - expected| / |expected|.

    The median, since rounding may change which expert a token goes to: that token then is far off.
    """
    apart = np.linalg.norm(logits - expected, axis=-1)
    return float(np.median(apart / np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)))


def sample_logits(
    setup: Assembly, trainable: Params, frozen: Params, dtype: str
) -> Float[np.ndarray, "T V"]:
    """Logits of some fixed random tokens; activations are computed in `dtype`."""
    ids, layout = sample_ids(setup), make_layout(setup.mesh)

    def model(trainable: Params, frozen: Params):
        merged = setup.partition.merge(trainable, frozen)
        merged.dtype = jnp.dtype(dtype)
        return merged

    def run(trainable: Params, frozen: Params, ids: jax.Array) -> jax.Array:
        x_BTD = model(trainable, frozen).hidden(ids, layout=layout).states
        return x_BTD[0]

    on_cpu = setup.mesh.devices.flat[0].platform == "cpu"
    options = LITTLE_MEMORY if on_cpu else None
    # Two programs: in one, float32 copies of embedding and head would be there at the same time.
    hidden = jax.jit(run, out_shardings=replicated(setup.mesh), compiler_options=options)
    head = jax.jit(lambda t, f, x_TD: model(t, f).head(x_TD), out_shardings=replicated(setup.mesh))
    x_TD = hidden(trainable, frozen, ids)
    return np.asarray(head(trainable, frozen, x_TD), np.float32)


def sample_ids(setup: Assembly) -> Int[Array, "B T"]:
    """Make some fixed random tokens.

    Every device that a batch is dealt to has them as its row, so that experts and weights stay
    where they are, and the tokens are the same on every mesh.
    """
    shards, vocab = batch_shards(setup.mesh), setup.model.config.vocab_size
    length = TOKENS + -TOKENS % length_multiple(setup.mesh)
    row = np.random.default_rng(0).integers(0, vocab, length, np.int32)
    ids = np.tile(row, (shards, 1))
    rows = make_layout(setup.mesh).rows
    return jax.make_array_from_callback(ids.shape, rows, lambda index: ids[index])
