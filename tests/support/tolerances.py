"""Assertions with the product's one table of tolerances."""

from __future__ import annotations

from torch import Tensor

from moe_dist.verify.tolerances import RELATIVE, TWENTY_STEPS, relative_error

__all__ = ["RELATIVE", "TWENTY_STEPS", "assert_close", "relative_error"]


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    """Fails unless the relative error is within the tolerance of the expected type."""
    error = relative_error(found.to(expected.dtype), expected)
    assert error <= RELATIVE[expected.dtype], f"{name}: relative error {error:.3g}"
