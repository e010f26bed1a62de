"""Rotary position embeddings: config.json's settings -> frequencies -> rotated queries and keys.

Shapes: B rows, T tokens, N heads, H head size. Formulas: transformers' modeling_rope_utils.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies in radians per position, one for each pair of a head's dimensions, and the scale of cos and sin.

    Dimensions after those pairs are not rotated.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    # Positions that the settings stretch to; None where the model's own maximum already says it.
    reach: int | None = None


def make_rope(settings: Mapping[str, Any], head_dim: int, max_positions: int, max_length: int, *,
              partial: bool = False) -> Rope:
    """Returns the rope of HF's `rope_parameters`; ValueError names an unknown type or a missing parameter.

    max_positions: the model's max_position_embeddings. max_length: the longest sequence of the run, which fixes the
    frequencies of the types 'dynamic' and 'longrope' (HF takes the longest sequence of each batch). partial: whether
    the family rotates the first `partial_rotary_factor` of a head's dimensions only.
    """
    kind = settings.get("rope_type", "default")
    if kind not in ROPES:
        raise ValueError(f"config.json: rope_type must be one of {', '.join(ROPES)}, got {kind!r}")
    unknown = set(settings) - ROPES[kind][1] - {"rope_type", "type", "rope_theta"}
    # transformers writes partial_rotary_factor = 1 into the settings of models that rotate whole heads.
    share = settings.get("partial_rotary_factor") or 1.0
    unknown -= {"partial_rotary_factor"} if partial or share == 1 else set()
    if unknown:
        raise ValueError(f"config.json: rope type {kind!r} does not take {', '.join(sorted(unknown))}; "
                         f"it takes {', '.join(sorted(ROPES[kind][1])) or 'rope_theta only'}")
    try:
        return ROPES[kind][0](settings, int(head_dim * share), max_positions, max_length)
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


def _longrope(settings, head_dim, max_positions, max_length):
    """Ding et al. 2024 (arXiv:2402.13753): each pair has its own factor, one for long sequences and one for others."""
    original = settings.get("original_max_position_embeddings", max_positions)
    factors = np.array(settings["long_factor" if max_length > original else "short_factor"])
    if len(factors) != head_dim // 2:
        raise ValueError(f"config.json: rope type 'longrope' needs {head_dim // 2} factors, got {len(factors)}")
    scale, stretch = settings.get("attention_factor"), settings.get("factor") or max_positions / original
    if scale is None:
        scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return Rope(tuple(_plain(settings["rope_theta"], head_dim) / factors), scale=float(scale))


# rope_type -> its formula, and the settings it takes beside rope_theta.
ROPES = {
    "default": (_default, set()),
    "linear": (_linear, {"factor"}),
    "dynamic": (_dynamic, {"factor", "original_max_position_embeddings"}),
    "yarn": (_yarn, {"factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate",
                     "original_max_position_embeddings"}),
    "longrope": (_longrope, {"short_factor", "long_factor", "factor", "attention_factor",
                             "original_max_position_embeddings"}),
    "llama3": (_llama3, {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


# Cos and sin of each position's angles, float32 [B, T, R] for R rotated pairs.
Rotation = tuple[Array, Array]


def rotations(ropes: Sequence[Rope | None], positions_BT: Array) -> tuple[Rotation | None, Array | None]:
    """Returns the rotation of all layers and None; or those of P ropes, [P, B, T, R], and which of them each layer has.

    ropes: of each layer. A layer without one turns by no angle where others have one.
    """
    distinct = list(dict.fromkeys(ropes))
    known = [rope for rope in distinct if rope is not None]
    if not known:
        return None, None
    pairs = len(known[0].frequencies)
    assert all(len(rope.frequencies) == pairs for rope in known)
    still = Rope((0.0,) * pairs)
    frequencies_PR, scales_P = (jnp.asarray([getattr(rope or still, name) for rope in distinct], jnp.float32)
                                for name in ("frequencies", "scale"))
    angles_PBTR = positions_BT[..., None].astype(jnp.float32) * frequencies_PR[:, None, None]
    cos, sin = (f(angles_PBTR) * scales_P[:, None, None, None] for f in (jnp.cos, jnp.sin))
    if len(distinct) == 1:
        return (cos[0], sin[0]), None
    return (cos, sin), jnp.array([distinct.index(rope) for rope in ropes])


def rotate(x_BTNH: Array, rotation: Rotation, interleaved: bool = False) -> Array:
    """Returns queries or keys rotated by their positions, float32 inside; dimensions beyond the rope's stay.

    interleaved: whether a pair is dimensions 2i and 2i + 1; else i and i + R, as in HF's Llama.
    """
    cos, sin = (x_BTR[:, :, None] for x_BTR in rotation)
    pairs = cos.shape[-1]
    turned = x_BTNH[..., :2 * pairs].astype(jnp.float32)
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    parts = first * cos - second * sin, second * cos + first * sin
    turned = (jnp.stack(parts, axis=-1).reshape(turned.shape) if interleaved
              else jnp.concatenate(parts, axis=-1)).astype(x_BTNH.dtype)
    return turned if 2 * pairs == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., 2 * pairs:]], axis=-1)
