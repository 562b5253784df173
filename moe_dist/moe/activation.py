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


class GEGLU:
    """`gelu(gate) * up`, with the exact GELU. Source: Shazeer 2020 (GLU variants), equation 6."""

    parts = 2

    def forward(self, *parts_RF: Tensor) -> tuple[Tensor, Tensor]:
        gate_RF, up_RF = parts_RF
        gelu_RF = F.gelu(gate_RF)
        return gelu_RF * up_RF, gelu_RF

    def backward(self, *parts_RF: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> None:
        assert by_product is not None, "the forward returned gelu(gate)"
        gate_RF, up_RF = parts_RF
        grad_gelu_RF = up_RF.mul_(grad_RF)
        torch.ops.aten.gelu_backward.grad_input(grad_gelu_RF, gate_RF, grad_input=gate_RF)
        torch.mul(by_product, grad_RF, out=up_RF)


class ClampedSwiGLU:
    """`gate * sigmoid(1.702 gate) * (up + 1)`, the gate at most 7 and the up projection within 7 of zero.

    Source: the model card and code of gpt-oss (OpenAI 2025). What lies beyond a bound has no gradient.
    """

    parts = 2
    slope, limit = 1.702, 7.0

    def forward(self, *parts_RF: Tensor) -> tuple[Tensor, Tensor]:
        gate_RF, up_RF = parts_RF
        gate_RF, up_RF = gate_RF.clamp(max=self.limit), up_RF.clamp(-self.limit, self.limit)
        swish_RF = gate_RF * torch.sigmoid(self.slope * gate_RF)
        return swish_RF * (up_RF + 1), swish_RF

    def backward(self, *parts_RF: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> None:
        assert by_product is not None, "the forward returned the gated part"
        gate_RF, up_RF = parts_RF
        inside_RF = up_RF.abs() <= self.limit
        under_RF = gate_RF <= self.limit
        sigmoid_RF = torch.sigmoid(self.slope * gate_RF)
        rise_RF = sigmoid_RF * (1 + self.slope * gate_RF * (1 - sigmoid_RF))
        gate_RF.copy_(grad_RF * (up_RF.clamp(-self.limit, self.limit) + 1) * rise_RF * under_RF)
        up_RF.copy_(grad_RF * by_product * inside_RF)


class SquaredReLU:
    """The rectifier, squared. Source: So et al. 2021 (Primer)."""

    parts = 1

    def forward(self, *parts_RF: Tensor) -> tuple[Tensor, None]:
        (up_RF,) = parts_RF
        return F.relu(up_RF).square(), None

    def backward(self, *parts_RF: Tensor, by_product: Tensor | None, grad_RF: Tensor) -> None:
        (up_RF,) = parts_RF
        up_RF.clamp_(min=0).mul_(2).mul_(grad_RF)


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
    """The activation that `model.moe.activation` or `model.ffn_activation` names."""
    match kind:
        case "swiglu":
            return SwiGLU()
        case "geglu":
            return GEGLU()
        case "clamped_swiglu":
            return ClampedSwiGLU()
        case "squared_relu":
            return SquaredReLU()
        case "gelu":
            return GELU()
        case "relu":
            return ReLU()
    raise AssertionError(f"the config tree allows no activation {kind!r}")
