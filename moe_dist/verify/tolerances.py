"""The one table of tolerances. Relative: the largest difference over the largest magnitude of the expected."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}

# Losses of the first twenty steps of two layouts in fp32: rounding adds up from step to step.
TWENTY_STEPS = 1e-4


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where shapes differ or a value is not finite."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    if found.numel() == 0:
        return 0.0
    scale = expected.abs().max().item() or 1.0
    return (found - expected).abs().max().item() / scale
