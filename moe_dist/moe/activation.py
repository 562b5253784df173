"""What stands between an expert's two products, with its backward written out for the `loop` back end.

Shape letters: R rows, F expert width, H columns of the first product (2F where it is gated, else F).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(Protocol):
    """An elementwise function of the first product.

    Attributes:
        columns: H / F.
    """

    columns: int

    def forward(self, hidden_RH: Tensor) -> tuple[Tensor, Tensor | None]:
        """The activation [R, F], and the by-product [R, F] that spares a gated one work in the backward."""
        ...

    def backward(self, hidden_RH: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> Tensor:
        """The gradient of the first product, [R, H]; may overwrite `grad_RF`."""
        ...


class SwiGLU:
    """`silu(gate) * up`; the first F columns are the gate. Source: Shazeer 2020 (GLU variants), equation 6."""

    columns = 2

    def forward(self, hidden_RH: Tensor) -> tuple[Tensor, Tensor]:
        gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
        silu_RF = F.silu(gate_RF)
        return silu_RF * up_RF, silu_RF

    def backward(self, hidden_RH: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> Tensor:
        assert by_product is not None, "the forward returned silu(gate)"
        gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
        grad_RH = torch.empty_like(hidden_RH)
        grad_gate_RF, grad_up_RF = grad_RH.chunk(2, dim=-1)
        torch.mul(grad_RF, by_product, out=grad_up_RF)
        torch.ops.aten.silu_backward.grad_input(grad_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
        return grad_RH


class GELU:
    """The exact Gaussian error linear unit. Source: Hendrycks and Gimpel 2016."""

    columns = 1

    def forward(self, hidden_RH: Tensor) -> tuple[Tensor, None]:
        return F.gelu(hidden_RH), None

    def backward(self, hidden_RH: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad_RF, hidden_RH)


class ReLU:
    """The rectifier, as in Switch and GShard."""

    columns = 1

    def forward(self, hidden_RH: Tensor) -> tuple[Tensor, None]:
        return F.relu(hidden_RH), None

    def backward(self, hidden_RH: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(grad_RF, hidden_RH, 0)


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
