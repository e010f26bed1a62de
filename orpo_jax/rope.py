"""Rotary position embeddings: config.json's settings -> frequencies -> rotated queries and keys.

Shapes: B rows, T tokens, N heads, H head size. Formulas: transformers' modeling_rope_utils.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies in radians per position, one for each pair of a head's dimensions, and the scale of cos and sin."""

    frequencies: tuple[float, ...]
    scale: float = 1.0
    # Positions that the settings stretch to; None where the model's own maximum already says it.
    reach: int | None = None


def make_rope(settings: Mapping[str, Any], head_dim: int, max_positions: int, max_length: int) -> Rope:
    """Returns the rope of HF's `rope_parameters`; ValueError names an unknown type or a missing parameter.

    max_positions: the model's max_position_embeddings. max_length: the longest sequence of the run, which fixes the
    frequencies of the type 'dynamic' (HF takes the longest sequence of each batch).
    """
    kind = settings.get("rope_type", "default")
    if kind not in ROPES:
        raise ValueError(f"config.json: rope_type must be one of {', '.join(ROPES)}, got {kind!r}")
    unknown = set(settings) - ROPES[kind][1] - {"rope_type", "type", "rope_theta"}
    # transformers writes partial_rotary_factor = 1 into the settings of models that rotate whole heads.
    unknown -= {"partial_rotary_factor"} if settings.get("partial_rotary_factor") in (None, 1, 1.0) else set()
    if unknown:
        raise ValueError(f"config.json: rope type {kind!r} does not take {', '.join(sorted(unknown))}; "
                         f"it takes {', '.join(sorted(ROPES[kind][1])) or 'rope_theta only'}")
    try:
        return ROPES[kind][0](settings, head_dim, max_positions, max_length)
    except KeyError as missing:
        raise ValueError(f"config.json: rope type {kind!r} needs {missing}, got {dict(settings)}") from None


def _plain(theta: float, head_dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def _default(settings, head_dim, max_positions, max_length):
    return Rope(tuple(_plain(settings["rope_theta"], head_dim)))


def _linear(settings, head_dim, max_positions, max_length):
    factor = settings["factor"]
    return Rope(tuple(_plain(settings["rope_theta"], head_dim) / factor), reach=int(max_positions * factor))


def _dynamic(settings, head_dim, max_positions, max_length):
    factor, length = settings["factor"], max(max_length, max_positions)
    stretch = factor * length / max_positions - (factor - 1)
    theta = settings["rope_theta"] * stretch ** (head_dim / (head_dim - 2))
    return Rope(tuple(_plain(theta, head_dim)), reach=int(max_positions * factor))


def _yarn(settings, head_dim, max_positions, max_length):
    """Peng et al. 2023 (arXiv:2309.00071): high frequencies stay, low ones are interpolated, a ramp between."""
    theta, original = settings["rope_theta"], settings.get("original_max_position_embeddings", max_positions)
    factor = settings["factor"]

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = settings.get("attention_factor")
    if scale is None:
        both = settings.get("mscale") and settings.get("mscale_all_dim")
        scale = mscale(settings["mscale"]) / mscale(settings["mscale_all_dim"]) if both else mscale(1.0)

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    plain = _plain(theta, head_dim)
    return Rope(tuple(plain / factor * ramp + plain * (1 - ramp)), scale=float(scale), reach=int(original * factor))


def _llama3(settings, head_dim, max_positions, max_length):
    plain = _plain(settings["rope_theta"], head_dim)
    original = settings.get("original_max_position_embeddings", max_positions)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    # 1 above the high frequency (kept), 0 below the low one (divided by factor), a ramp between.
    keep = np.clip((original * plain / (2 * math.pi) - low) / (high - low), 0, 1)
    return Rope(tuple(plain * (keep + (1 - keep) / settings["factor"])), reach=int(original * settings["factor"]))


# rope_type -> its formula, and the settings it takes beside rope_theta.
ROPES = {
    "default": (_default, set()),
    "linear": (_linear, {"factor"}),
    "dynamic": (_dynamic, {"factor", "original_max_position_embeddings"}),
    "yarn": (_yarn, {"factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate",
                     "original_max_position_embeddings"}),
    "llama3": (_llama3, {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


def angles(rope: Rope, positions_BT: Array) -> tuple[Array, Array]:
    """Returns cos and sin of each position's angles, float32 [B, T, H/2]."""
    angles_BTH = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(rope.frequencies, jnp.float32)
    return jnp.cos(angles_BTH) * rope.scale, jnp.sin(angles_BTH) * rope.scale


def rotate(x_BTNH: Array, cos_BTH: Array, sin_BTH: Array) -> Array:
    """Returns queries or keys rotated by their positions; a pair is dimensions i and i + H/2, as in HF's Llama."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
