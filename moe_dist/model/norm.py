"""Norms of the residual stream. Shape letters: D model width.

    rms           w x / sqrt(mean of squares)
    layer         w (x - mean) / sqrt(variance) + b
    centred_rms   w x / sqrt((|x|^2 + (sum of x)^2) / (D + 1))

The third is the first of D + 1 numbers whose mean is zero, of which the last, minus the sum of the others, is not kept.
All work in fp32 or wider. Source: Zhang and Sennrich 2019; Ba et al. 2016; Jiang et al. 2023 (arXiv 2305.14858).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.model.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Divides by the root mean square and scales. Source: Zhang and Sennrich 2019, equation 4."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(exact), self.weight.to(exact), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Takes the mean off, divides by the standard deviation, scales and shifts. Source: Ba et al. 2016, equation 4."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(exact), self.bias.to(exact)
        return F.layer_norm(x.to(exact), weight.shape, weight, bias, self.eps).to(x.dtype)


class CentredRMSNorm(RMSNorm):
    """RMSNorm of D + 1 numbers whose mean is zero, given the first D. Source: Jiang et al. 2023, equation 10."""

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(exact)
        squares = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
        scale = torch.rsqrt(squares / (x.shape[-1] + 1) + self.eps)
        return (wide * scale * self.weight.to(exact)).to(x.dtype)


def norm_of(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm that `model.norm` names, for the residual stream."""
    size = config.width, config.norm_eps
    match config.norm:
        case "layer":
            return LayerNorm(*size)
        case "centred_rms":
            return CentredRMSNorm(*size)
    return RMSNorm(*size)
