"""RMSNorm. Shape letters: D model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.model.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Divides by the root mean square and scales, in fp32 or wider. Source: Zhang and Sennrich 2019, equation 4."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(exact), self.weight.to(exact), self.eps).to(x.dtype)
