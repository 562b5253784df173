"""The root-mean-square norm as a function, with a backward written out for CPUs.

Shape letters: T tokens, D width. With s = 1 / sqrt(mean of squares + eps) of each token:

    y = w s x        dw = sum over tokens of s (g x)        dx = s w g - x s^3 <g x, w> / D

where g is the gradient of y. On a CPU torch composes the norm of some ten passes over memory and its backward of more;
here they are three and five, of which two are matrix-vector products (docs/log.md). Elsewhere torch has one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divides every vector of the last dimension by its root mean square, and scales.

    Args:
        x: [..., D], fp32 or wider.
        weight_D: Of the same type.
        eps: Added to the mean of squares.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight_D, eps)
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        product_TD = (grads[0] * x).flatten(0, -2)
        weight_grad_D = scale.flatten() @ product_TD
        pull = (product_TD @ weight_D).view_as(scale).mul_(scale.pow(3)).div_(-x.shape[-1])
        x_grad = torch.mul(grads[0], weight_D, out=product_TD.view_as(x)).mul_(scale)
        return x_grad.addcmul_(x, pull), weight_grad_D, None
