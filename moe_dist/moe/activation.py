"""What stands between an expert's two products, with its backward written out for the `loop` back end.

Shape letters: R rows, F expert width, H columns of the first product (2F where it is gated, else F). The parts of a
gated product are views of its columns, so that one product of matrices makes both, and one takes both gradients back.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(Protocol):
    """An elementwise function of the first product.

    Attributes:
        parts: H / F.
    """

    parts: int

    def forward(self, *parts_RF: Tensor) -> tuple[Tensor, Tensor | None]:
        """The activation [R, F], and the by-product [R, F] that spares a gated one work in the backward."""
        ...

    def backward(self, *parts_RF: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> None:
        """Overwrites each part with its gradient."""
        ...


class SwiGLU:
    """`silu(gate) * up`; the first F columns are the gate. Source: Shazeer 2020 (GLU variants), equation 6."""

    parts = 2

    def forward(self, *parts_RF: Tensor) -> tuple[Tensor, Tensor]:
        gate_RF, up_RF = parts_RF
        silu_RF = F.silu(gate_RF)
        return silu_RF * up_RF, silu_RF

    def backward(self, *parts_RF: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> None:
        assert by_product is not None, "the forward returned silu(gate)"
        gate_RF, up_RF = parts_RF
        grad_silu_RF = up_RF.mul_(grad_RF)
        torch.ops.aten.silu_backward.grad_input(grad_silu_RF, gate_RF, grad_input=gate_RF)
        torch.mul(by_product, grad_RF, out=up_RF)


class GELU:
    """The exact Gaussian error linear unit. Source: Hendrycks and Gimpel 2016."""

    parts = 1

    def forward(self, *parts_RF: Tensor) -> tuple[Tensor, None]:
        (up_RF,) = parts_RF
        return F.gelu(up_RF), None

    def backward(self, *parts_RF: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> None:
        (up_RF,) = parts_RF
        torch.ops.aten.gelu_backward.grad_input(grad_RF, up_RF, grad_input=up_RF)


class ReLU:
    """The rectifier, as in Switch and GShard."""

    parts = 1

    def forward(self, *parts_RF: Tensor) -> tuple[Tensor, None]:
        (up_RF,) = parts_RF
        return F.relu(up_RF), None

    def backward(self, *parts_RF: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> None:
        (up_RF,) = parts_RF
        torch.ops.aten.threshold_backward.grad_input(grad_RF, up_RF, 0, grad_input=up_RF)


def activation_of(kind: str) -> Activation:
    """The activation that `model.moe.activation` names."""
    match kind:
        case "swiglu":
            return SwiGLU()
        case "gelu":
            return GELU()
        case "relu":
            return ReLU()
    raise AssertionError(f"the config tree allows no activation {kind!r}")
