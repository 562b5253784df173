"""Measuring what a device can do, so that a run's speed can be told as a share of it."""

from __future__ import annotations

import time

import torch

from moe_dist.moe.product import product


def measure_gemm_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Best rate of a square matrix product on this device and these threads, in floating-point operations a second.

    Ranks that share a machine call it at the same time, so that each measures its own share.
    """
    size = 4096 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        started = time.perf_counter()
        product(left, right)
        _wait(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
