# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: from the words of a config.json to rotated queries and keys.

In: a checkpoint's config dictionary (the hub's dialect `rope_theta` + `rope_scaling`, or
transformers 5's `rope_parameters`), then positions. Out: inverse frequencies with the factor on
cos and sin, and the rotation itself. Not done here: scaling of the softmax (MLA models do that in
their attention).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.errors import ConfigError, raise_all
from dsjax.models.config_checks import is_positive, shown

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = (
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class Rope:
    """Frequencies of one model.

    Attributes:
        inv_freq: one inverse frequency per rotated pair, float32 values.
        attention_factor: what cos and sin are multiplied by.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float


def rope_from_config(config: Mapping[str, Any], dim: int) -> Rope:
    """Read either dialect of rope settings; transformers' `modeling_rope_utils` is the reference.

    Args:
        config: the checkpoint's config.json.
        dim: rotated dimensions per head.

    Raises:
        ConfigError: the type is not supported or a number that it needs is missing or wrong.
    """
    field, settings = rope_settings(config)
    rope_type = settings.get("rope_type") or settings.get("type") or "default"
    _check(field, config, settings, dim)
    with np.errstate(all="ignore"):  # what overflows is found below
        rope = _computed(config, rope_type, settings, dim)
    if not all(math.isfinite(value) and value > 0 for value in rope.inv_freq):
        numbers = {key: value for key, value in settings.items() if value is not None}
        raise ConfigError(
            f"config.json {field}: got {shown(numbers)}, expected numbers that give rotations > 0 "
            "which float32 can hold"
        )
    return rope


def _computed(
    config: Mapping[str, Any], rope_type: str, settings: Mapping[str, Any], dim: int
) -> Rope:
    theta = float(settings["rope_theta"])
    base = (1.0 / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(
        np.float32
    )
    if rope_type == "default":
        return _rope(base, 1.0)
    if rope_type == "linear":
        return _rope(base / np.float32(settings["factor"]), 1.0)
    original = float(
        config.get("original_max_position_embeddings")
        or settings.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    if rope_type == "llama3":
        return _rope(_llama3(base, settings, original), 1.0)
    return _rope(_yarn(base, settings, original, theta, dim), _yarn_attention_factor(settings))


def rope_settings(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the rope dictionary with `rope_theta` inside, and the field it was read from.

    Raises:
        ConfigError: one of the dictionaries is something else.
    """
    raise_all(
        f"config.json {field}: got {shown(config[field])}, expected a mapping or null"
        for field in ("rope_scaling", "rope_parameters")
        if not isinstance(config.get(field), Mapping | None)
    )
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    settings = dict(config.get(field) or {})
    for key, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", 1.0)):
        if settings.get(key) is None:
            settings[key] = default if config.get(key) is None else config[key]
    return field, settings


def _check(field: str, config: Mapping[str, Any], settings: Mapping[str, Any], dim: int) -> None:
    problems = [
        f"config.json {field}.rope_type: got {shown(settings[key])}, expected one of "
        f"{', '.join(ROPE_TYPES)}; this model cannot be computed exactly with another one"
        for key in ("rope_type", "type")
        if settings.get(key) is not None and settings[key] not in ROPE_TYPES
    ]
    raise_all(problems)
    rope_type = settings.get("rope_type") or settings.get("type") or "default"
    problems += [
        f"config.json {field}.{key}: got {shown(settings.get(key))}, expected a number > 0 for "
        f"rope_type {rope_type}"
        for key in _REQUIRED[rope_type]
        if not is_positive(settings.get(key))
    ]
    problems += [
        f"config.json {field}.{key}: got {shown(settings[key])}, expected a number >= 0 or null"
        for key in _OPTIONAL
        if settings.get(key) is not None and not _is_zero_or_more(settings[key])
    ]
    problems += _shared_problems(field, config, settings, least=1 if rope_type == "yarn" else 0)
    if not isinstance(settings.get("truncate", True), bool | None):
        problems.append(
            f"config.json {field}.truncate: got {shown(settings['truncate'])}, expected true or "
            "false"
        )
    if dim % 2:
        problems.append(
            f"config.json head_dim: got {dim}, expected an even number for rope (qk_rope_head_dim, "
            "or hidden_size / num_attention_heads where it is not given)"
        )
    raise_all(problems)


def _shared_problems(
    field: str, config: Mapping[str, Any], settings: Mapping[str, Any], least: int
) -> list[str]:
    """Keys that may stand in the rope dictionary or beside it."""
    theta, part = settings["rope_theta"], settings["partial_rotary_factor"]
    problems = []
    if not is_positive(theta) or theta <= least:
        problems.append(
            f"config.json {_place(field, config, 'rope_theta')}: got {shown(theta)}, expected a "
            f"number > {least}"
        )
    if part != 1.0:
        problems.append(
            f"config.json {_place(field, config, 'partial_rotary_factor')}: got {shown(part)}, "
            "expected 1.0 (every dimension of a head is rotated in the supported models)"
        )
    beside = config.get("original_max_position_embeddings")
    if beside is not None and not is_positive(beside):
        problems.append(
            f"config.json original_max_position_embeddings: got {shown(beside)}, expected a number "
            "> 0 or null"
        )
    return problems


def _place(field: str, config: Mapping[str, Any], key: str) -> str:
    """Where a key was read: in the rope dictionary or beside it."""
    return f"{field}.{key}" if (config.get(field) or {}).get(key) is not None else key


def _is_zero_or_more(value: Any) -> bool:
    return is_positive(value) or (type(value) in (int, float) and value == 0)


def _rope(inv_freq: np.ndarray, attention_factor: float) -> Rope:
    return Rope(tuple(float(f) for f in inv_freq.astype(np.float32)), float(attention_factor))


def _llama3(inv_freq: np.ndarray, settings: Mapping[str, Any], original: float) -> np.ndarray:
    """Llama 3.1's three bands: keep the short wavelengths, stretch the long, blend between."""
    factor, low, high = (
        np.float32(settings[k]) for k in ("factor", "low_freq_factor", "high_freq_factor")
    )
    wavelength = np.float32(2 * math.pi) / inv_freq
    blend = (np.float32(original) / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    stretched = np.where(wavelength > original / low, inv_freq / factor, inv_freq)
    medium = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(medium, blended, stretched)


def _yarn(
    inv_freq: np.ndarray, settings: Mapping[str, Any], original: float, theta: float, dim: int
) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate the slow dimensions, keep the fast ones."""

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(settings.get("beta_fast") or 32))
    high = dimension(float(settings.get("beta_slow") or 1))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    # Clamped to dim - 1 and not dim / 2 - 1: so does the reference.
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / span, 0, 1)
    ramp = ramp.astype(np.float32)
    return inv_freq / np.float32(settings["factor"]) * ramp + inv_freq * (1 - ramp)


def _yarn_attention_factor(settings: Mapping[str, Any]) -> float:
    """`attention_factor`, else the ratio of both mscales, else 0.1 ln(factor) + 1.

    `attn_factor` (R1-0528-Qwen3-8B) is not read, as in transformers.
    """
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def gain(mscale: float) -> float:
        factor = float(settings["factor"])
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return gain(float(settings["mscale"])) / gain(float(settings["mscale_all_dim"]))
    return gain(1.0)


def rope_tables(
    rope: Rope, position_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cosines and sines of every position, in float32; `rotate` casts them."""
    inv_freq = jnp.asarray(rope.inv_freq, jnp.float32)
    angles_BTR = position_ids[..., None].astype(jnp.float32) * inv_freq
    angles_BTH = jnp.concatenate([angles_BTR, angles_BTR], axis=-1)
    cos_BTH = jnp.cos(angles_BTH) * rope.attention_factor
    sin_BTH = jnp.sin(angles_BTH) * rope.attention_factor
    return cos_BTH, sin_BTH


def rotate(
    x_BTNH: Float[Array, "B T N H"], cos_BTH: Float[Array, "B T H"], sin_BTH: Float[Array, "B T H"]
) -> Float[Array, "B T N H"]:
    """Rotate each head in x's dtype; dimension i goes with i + H/2 (Llama's half-split order)."""
    cos_BTH, sin_BTH = cos_BTH.astype(x_BTNH.dtype), sin_BTH.astype(x_BTNH.dtype)
    first_BTNR, second_BTNR = jnp.split(x_BTNH, 2, axis=-1)
    turned_BTNH = jnp.concatenate([-second_BTNR, first_BTNR], axis=-1)
    return x_BTNH * cos_BTH[:, :, None] + turned_BTNH * sin_BTH[:, :, None]


def split_pairs(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Bring DeepSeek's interleaved pairs (2i, 2i + 1) into half-split order.

    Queries and keys take the same new order, so their products stay what they were.
    """
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def positions_like(input_ids: jax.Array) -> jax.Array:
    """Positions 0..T-1 for rows that hold one sequence each."""
    return jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
