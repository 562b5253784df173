"""Rotary position embedding and its stretching to longer contexts.

Shape letters: B batch, S sequence, H heads, C the channels of a head that are turned.

Channel pair c turns by `position * frequency_c`, where `frequency_c = theta ** (-2c / C)`, and `rope_scaling.kind`

    linear   divides every frequency by the factor
    ntk      takes the base theta * factor ** (C / (C - 2)): the slowest pair is divided, the fastest kept
    yarn     divides where a pair turns less than beta_slow times in the old context, keeps it where it turns more than
             beta_fast times, and mixes between; cosines and sines grow by 0.1 ln(factor) + 1

Source: Su et al. 2021 (RoFormer), equation 34; Chen et al. 2023 (linear); bloc97 2023 (NTK-aware); Peng et al. 2023
(YaRN), equations 21 to 25; DeepSeek-V2 for `mscale` and `mscale_all_dim`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.config.model_schema import RopeScalingConfig

_TEMPERATURE = 0.1  # YaRN, equation 22


def turned_width(config: ModelConfig) -> int:
    """Channels of a head that are turned."""
    attention = config.attention
    return attention.latent.rope_width if attention.kind == "latent" else config.head_width


def rope_table(position: Tensor, config: ModelConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., C/2] of positions [...], computed in fp64 and never stored in the model."""
    angle = position.double()[..., None] * frequencies(config).to(position.device)
    exact = torch.promote_types(like.dtype, torch.float32)
    if config.positions != "rope":  # nothing is turned
        angle = torch.zeros_like(angle)
    size = _size(config.rope_scaling)
    return (angle.cos() * size).to(exact), (angle.sin() * size).to(exact)


def rotate(x_BHSC: Tensor, table: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Turns channel c and c + C/2 of every head, or 2c and 2c + 1, by the angle of the position.

    As `cos * x + sin * partner of x`, over all channels at once: a third of the passes over memory that pairs taken
    apart and put together again need (docs/log.md).
    """
    wide = x_BHSC.to(table[0].dtype)
    half = x_BHSC.shape[-1] // 2
    partner = wide.unflatten(-1, (half, 2)).flip(-1).flatten(-2) if interleaved else wide.roll(half, -1)
    cos, sin = (_over_channels(value, sign, interleaved) for value, sign in zip(table, (1, -1), strict=True))
    return torch.addcmul(wide * cos, partner, sin).to(x_BHSC.dtype)


def _over_channels(value: Tensor, sign: int, interleaved: bool) -> Tensor:
    """[..., C] of [..., C/2]: the first of each pair takes it with a sign."""
    both = sign * value, value
    return torch.stack(both, dim=-1).flatten(-2) if interleaved else torch.cat(both, dim=-1)


def frequencies(config: ModelConfig) -> Tensor:
    """Radians a position by which each pair of channels turns, fp64 [C/2], on the CPU."""
    width, base, scaling = turned_width(config), config.rope_theta, config.rope_scaling
    if scaling.kind == "ntk":
        base *= scaling.factor ** (width / (width - 2))
    plain = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    match scaling.kind:
        case "linear":
            return plain / scaling.factor
        case "yarn":
            low, high = _bounds(width, base, scaling)
            divided = ((torch.arange(width // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
            return plain * (1 - divided) + plain / scaling.factor * divided
    return plain


def score_factor(scaling: RopeScalingConfig) -> float:
    """Factor on all scores of latent attention: DeepSeek puts YaRN's temperature there."""
    return _temperature(scaling.factor, scaling.mscale_all_dim) ** 2 if scaling.mscale_all_dim else 1.0


def _size(scaling: RopeScalingConfig) -> float:
    """Factor on cosines and sines."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        every = _temperature(scaling.factor, scaling.mscale_all_dim)
        return _temperature(scaling.factor, scaling.mscale) / every
    return _temperature(scaling.factor, 1.0)


def _temperature(factor: float, weight: float) -> float:
    return _TEMPERATURE * weight * math.log(factor) + 1.0


def _bounds(width: int, base: float, scaling: RopeScalingConfig) -> tuple[float, float]:
    """The pairs, as real numbers, that turn `beta_fast` and `beta_slow` times in the old context."""

    def pair(turns: float) -> float:
        return width * math.log(scaling.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.whole_bounds:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return low, high if high != low else high + 0.001
