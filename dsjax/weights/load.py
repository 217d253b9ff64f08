# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's files to sharded parameters, streamed.

In: an opened source (`hf_directory` or `dsjax_format`), the model's leaves and their shardings.
Out: every base parameter on its devices, in its dtype. First the checkpoint's tensors and the
model's parameters are proven to cover each other; then each device's part is read from the files in
pieces of bounded size, so that host memory does not grow with the model. Not done here: adapters'
values, writing checkpoints.
"""

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from dsjax.distributed import arrays
from dsjax.distributed.arrays import row_pieces
from dsjax.distributed.sharding import Leaf, Params
from dsjax.errors import ConfigError, raise_all
from dsjax.models import Model, base_shapes, build, carried_of, entries_of, stored_linears
from dsjax.models.layers import Linear
from dsjax.models.moe import ExpertLinear
from dsjax.models.storage import DENSE, Encode, Storage, storage_of
from dsjax.models.weight_rules import EMBEDDING, HEAD, Entry, coverage_problems, entry_shape
from dsjax.weights import dsjax_format, fp8, hf_directory
from dsjax.weights.source import Source
from dsjax.weights.storage import in_order


def open_checkpoint(
    path: str,
    revision: str | None = None,
    weights: bool = True,
    adapter: str | None = None,
    checked: bool = False,
) -> Source:
    """Open a Hugging Face directory, a URL of one, a hub id, or a directory written by `to-flax`.

    What is read from it are numbers, also where the files hold FP8 bytes and scales.

    Args:
        path: the place.
        revision: branch, tag or commit of the hub repository.
        weights: False leaves the weights alone.
        adapter: path of the adapter that goes with the model.
        checked: whether what config.json and the index say is checked where weights are left alone.

    Raises:
        ConfigError: nothing there, damaged files, or a model that we do not compute.
    """
    if dsjax_format.is_flax_checkpoint(path):
        return fp8.dequantised(dsjax_format.open_flax(path))
    check = check_config if weights or checked else None
    source = hf_directory.open_source(path, revision, weights, adapter, check)
    return fp8.dequantised(source) if weights else source


def check_config(config: Mapping[str, Any], names: Collection[str] | None = None) -> None:
    """Hold config.json, and the names of the tensors that an index lists, against what we compute.

    So a model is refused before its weights are downloaded, and where they are not looked at.

    Raises:
        ConfigError: another kind of model or of quantisation, or tensors of other names.
    """
    quantised = fp8.read_format(config) is not None
    model = build(config, "float32")
    if names is None:
        return
    shapes, entries = base_shapes(model), entries_of(model)
    wanted = {entry.hf: entry_shape(entry, shapes) for entry in entries}
    scales = {name for name in names if quantised and name.endswith(fp8.SCALE)}
    found = {name: wanted.get(name, ()) for name in names if name not in scales}
    carried = (*carried_of(model), re.escape(HEAD)) if model.lm_head is None else carried_of(model)
    raise_all(coverage_problems(entries, shapes, found, carried)[0])


def check_coverage(source: Source, model: Model) -> list[str]:
    """Prove that the checkpoint holds the model; returns the names of tensors it only carries.

    Raises:
        ConfigError: every tensor that is missing, left over or of another shape.
    """
    entries, shapes = entries_of(model), base_shapes(model)
    found = {name: info.shape for name, info in source.tensors.items()}
    carried = carried_of(model)
    if model.lm_head is None and HEAD in found:
        _check_tied(source)
        carried = (*carried, HEAD)
    problems, kept = coverage_problems(entries, shapes, found, carried)
    if model.lm_head is not None and HEAD not in found and EMBEDDING in found:
        problems.append(
            f"config.json tie_word_embeddings: got false, and the files hold no {HEAD}, expected "
            "true if the head is the embedding, else the tensor"
        )
    raise_all(problems)
    raise_all(_copy_problems(source, entries))
    return kept


def _check_tied(source: Source) -> None:
    """Refuse a head beside a tied embedding that is not the embedding."""
    if not _are_same(source, HEAD, EMBEDDING):
        raise ConfigError(
            f"{HEAD}: got a tensor that differs from {EMBEDDING}, expected the same values or "
            "none, since config.json says tie_word_embeddings; set it to false, or remove the "
            "tensor"
        )


def _copy_problems(source: Source, entries: Sequence[Entry]) -> list[str]:
    """List second copies of a tensor that differ from it: only one of them is computed with."""
    own = {entry.path: entry.hf for entry in entries if not entry.copy}
    return [
        f"{entry.hf}: got a tensor that differs from {own[entry.path]}, expected the same values "
        "or none: the module for multi-token prediction shares it (arXiv 2412.19437). Training "
        "without the module leaves it behind: start from the checkpoint before that, or set "
        "objective.mtp_loss_weight=0"
        for entry in entries
        if entry.copy
        and entry.hf in source.tensors
        and not _are_same(source, entry.hf, own[entry.path])
    ]


def _are_same(source: Source, name: str, other: str) -> bool:
    """Whether two tensors of a checkpoint hold the same numbers."""
    found, expected = source.tensors[name], source.tensors.get(other)
    return (
        expected is not None
        and found.shape == expected.shape
        and all(
            np.array_equal(source.read(name, index), source.read(other, index))
            for index in row_pieces(found.shape, found.dtype.itemsize)
        )
    )


def load_base(
    source: Source,
    model: Model,
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, Sharding],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Params:
    """Read base parameters onto their devices.

    Args:
        source: the opened checkpoint; `check_coverage` has passed.
        model: the abstract model.
        leaves: those to read, by path, with the dtype each is held in.
        shardings: by path.
        progress: told the bytes read so far and in all.
    """
    entries = [entry for entry in entries_of(model) if not entry.copy]
    return load_entries(source, entries, leaves, shardings, progress, stored_linears(model))


def load_entries(
    source: Source,
    entries: Sequence[Entry],
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, Sharding],
    progress: Callable[[int, int], None],
    stored: Mapping[str, Linear | ExpertLinear] = MappingProxyType({}),
) -> Params:
    """Read the leaves that these tensors are; of a stored one all arrays that hold it."""
    by_path: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.path in leaves:
            by_path.setdefault(entry.path, []).append(entry)
    total = sum(source.tensors[e.hf].nbytes for entries in by_path.values() for e in entries)
    params, done = {}, 0
    encoders: dict[Storage, Encode] = {}
    for path, entries in by_path.items():
        storage, arrays = storage_of(stored.get(path))
        encode = encoders.setdefault(storage, storage.encoder(source))
        for array in arrays:
            leaf, sharding = leaves[path + array], shardings[path + array]
            reader = _Reader(source, storage is DENSE, array, encode, leaf.dtype)
            params[path + array] = _load_leaf(reader, entries, leaf, sharding)
        done += sum(source.tensors[entry.hf].nbytes for entry in entries)
        progress(done, total)
    return params


P = TypeVar("P")
Piece = np.ndarray | fp8.Quantised
"""Some rows of a tensor: its numbers, or what a device makes them of."""


@dataclass(frozen=True)
class _Reader:
    """Reads parts of the tensors that one array holds.

    Attributes:
        source: the checkpoint.
        dense: whether the array is the parameter itself.
        array: which of those that hold it.
        encode: makes parts of these.
        dtype: of the array.
    """

    source: Source
    dense: bool
    array: str
    encode: Encode
    dtype: np.dtype

    def numbers(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part and cast it; float16 must be able to hold the values."""
        values = self.encode(name, self.array, index)
        with np.errstate(over="ignore"):  # told below
            cast = values.astype(self.dtype, copy=False)
        if self.dtype == np.float16 and np.isinf(cast).any() and not np.isinf(values).any():
            raise ConfigError(
                f"{name}: got values beyond 65504, which float16 cannot hold, expected "
                "model.dtype bfloat16 or float32"
            )
        return cast

    def piece(self, name: str, index: tuple[slice, ...]) -> Piece:
        """Read a part, of FP8 the bytes: a device makes numbers of them several times as fast."""
        if self.dense and isinstance(self.source, fp8.DequantisedSource):
            quantised = self.source.read_quantised(name, index, self.dtype)
            if quantised is not None:
                return quantised
        return self.numbers(name, index)


Bounds = tuple[tuple[int, int], ...]
"""First and one past the last index of every axis."""


def _load_leaf(
    reader: _Reader, entries: Sequence[Entry], leaf: Leaf, sharding: Sharding
) -> jax.Array:
    """Fill the part of every local device; devices that need the same rows share their reading."""
    groups: dict[Bounds, dict[Bounds, list[Any]]] = {}
    rows = len(entries[0].index) + 1
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index or (), leaf.shape, strict=True)
        )
        groups.setdefault(bounds[:rows], {}).setdefault(bounds, []).append(device)
    shards = []
    for parts in groups.values():
        shards += _load_parts(reader, entries, leaf, parts)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _load_parts(
    reader: _Reader, entries: Sequence[Entry], leaf: Leaf, parts: Mapping[Bounds, Sequence[Any]]
) -> list[jax.Array]:
    """Parts of a leaf on their devices: at once if they are small, else piece by piece.

    The parts differ only in the axes after the rows, so they are cut from the same pieces.
    """
    hull = tuple((min(axis)[0], max(axis)[1]) for axis in zip(*parts, strict=True))
    ahead, lead = reader.source.reads_ahead, len(entries[0].index)
    cuts = {bounds: _cut(bounds[lead:], hull[lead:]) for bounds in parts}
    shapes = {bounds: tuple(stop - start for start, stop in bounds) for bounds in parts}
    if sum(map(math.prod, shapes.values())) * leaf.dtype.itemsize <= arrays.PIECE_BYTES:
        wholes = {bounds: np.zeros(shape, leaf.dtype) for bounds, shape in shapes.items()}
        for start, numbers in in_order(_reads(reader.numbers, entries, leaf, hull), ahead):
            for bounds, whole in wholes.items():
                own = numbers[cuts[bounds]]
                inner = [slice(s, s + n) for s, n in zip(start[lead:], own.shape, strict=True)]
                whole[(*start[:lead], *inner)] = own
        return [jax.device_put(wholes[b], device) for b, own in parts.items() for device in own]
    places = [(bounds, device) for bounds, devices in parts.items() for device in devices]
    buffers = [_zeros(shapes[bounds], leaf.dtype, device) for bounds, device in places]
    for start, piece in in_order(_reads(reader.piece, entries, leaf, hull), ahead):
        # Waiting keeps host memory to the pieces that are read ahead.
        buffers = [
            _write(
                buffer,
                jax.device_put(_part(piece, cuts[bounds]), device),
                start,
                as_bits=device.platform == "cpu",
            )
            for buffer, (bounds, device) in zip(buffers, places, strict=True)
        ]
        jax.block_until_ready(buffers)
    return buffers


def _cut(bounds: Bounds, hull: Bounds) -> tuple[slice, ...]:
    """Return where in a piece of the hull the part within these bounds is; the rows are all its."""
    return tuple(
        slice(None) if part == all_ else slice(part[0] - all_[0], part[1] - all_[0])
        for part, all_ in zip(bounds, hull, strict=True)
    )


def _part(piece: Piece, cut: tuple[slice, ...]) -> Piece:
    if isinstance(piece, fp8.Quantised):
        return piece._replace(codes=piece.codes[cut], scales=piece.scales[cut])
    return piece[cut]


def _reads(
    read: Callable[[str, tuple[slice, ...]], P],
    entries: Sequence[Entry],
    leaf: Leaf,
    bounds: Bounds,
) -> Iterator[Callable[[], tuple[tuple[int, ...], P]]]:
    """Yield the reads of a part's pieces with their place in it: some rows of one tensor each.

    A file's rows are read whole, so that pieces are bounded by whole rows.
    """
    lead = len(entries[0].index)
    by_index = {entry.index: entry for entry in entries}
    stacked, inner = bounds[:lead], bounds[lead:]
    shape = (*(stop - start for start, stop in inner[:1]), *leaf.shape[lead + 1 :])
    for position in itertools.product(*(range(stop - start) for start, stop in stacked)):
        at = tuple(start + i for (start, _), i in zip(stacked, position, strict=True))
        if at not in by_index:  # a stack in which some tensors have no scales
            continue
        for rows in row_pieces(shape, leaf.dtype.itemsize):
            offset = rows[0].start if rows else 0
            index = tuple(slice(*bound) for bound in inner)
            if rows:
                first = inner[0][0]
                index = (slice(first + rows[0].start, first + rows[0].stop), *index[1:])
            start = (offset,) + (0,) * (len(inner) - 1) if inner else ()
            yield partial(_placed, read, by_index[at].hf, index, (*position, *start))


def _placed(
    read: Callable[[str, tuple[slice, ...]], P],
    name: str,
    index: tuple[slice, ...],
    start: tuple[int, ...],
) -> tuple[tuple[int, ...], P]:
    """Return a piece with its place."""
    return start, read(name, index)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: Any) -> jax.Array:
    return jax.device_put(jnp.zeros(shape, dtype, device=device), device)


@partial(jax.jit, donate_argnums=0, static_argnames="as_bits")
def _write(buffer: jax.Array, piece: Any, start: tuple[jax.Array, ...], as_bits: bool) -> jax.Array:
    """Put a piece into its place; of FP8, make the numbers.

    Traps: XLA for CPU turns a bfloat16 buffer into float32 and back to update it, all of it for
    every piece, unless it is updated as bits; XLA for TPU copies all of it if it is.
    """
    if isinstance(piece, fp8.Quantised):
        piece = fp8.dequantise(piece, buffer.dtype)
    piece = piece.reshape((1,) * (buffer.ndim - piece.ndim) + piece.shape)
    if not as_bits:
        return jax.lax.dynamic_update_slice(buffer, piece, start)
    bits = partial(
        jax.lax.bitcast_convert_type, new_dtype=jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")
    )
    updated = jax.lax.dynamic_update_slice(bits(buffer), bits(piece), start)
    return jax.lax.bitcast_convert_type(updated, buffer.dtype)
