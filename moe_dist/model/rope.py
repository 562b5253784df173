"""Rotary position embedding. Shape letters: B batch, S sequence, H heads, C head width."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(length: int, head_width: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, C/2] of positions 0..length-1, computed in fp64 and never stored in the model.

    Source: Su et al. 2021 (RoFormer), equation 34, in the half-split pairing used by Llama checkpoints.
    """
    channel = torch.arange(0, head_width, 2, dtype=torch.float64, device=like.device)
    angle = torch.arange(length, dtype=torch.float64, device=like.device)[:, None] * theta ** (-channel / head_width)
    exact = torch.promote_types(like.dtype, torch.float32)
    return angle.cos().to(exact), angle.sin().to(exact)


def rotate(x_BHSC: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel c and c + C/2 of every head by the angle of the position."""
    cos, sin = table
    first, second = x_BHSC.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHSC.dtype)
