"""Matrix products in fp32 on a CPU, by the faster of the two libraries that torch carries.

torch multiplies fp32 matrices by MKL, which on other makers' processors stays with AVX2 where they have AVX-512.
oneDNN, which torch carries too, does not ask who made them: 235 to 260 GFLOP/s a core in place of 108 to 112
(docs/log.md), with IEEE fp32 as exact as before and the same bits on every run.

It is taken where torch finds AVX-512 and oneDNN (`ATEN_CPU_CAPABILITY=avx2` or `torch.backends.mkldnn.enabled = False`
leave it out); everything else, and what `torch.compile` or autocast sees, is torch's own product: the oracle in tests.

Shape letters: M, K, N of a product; T tokens, D inputs, H outputs; R rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def has_onednn() -> bool:
    """Whether this machine has AVX-512 and this torch oneDNN."""
    has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_product and torch.backends.cpu.get_cpu_capability() == "AVX512"


def takes_onednn(*matrices: Tensor) -> bool:
    """Whether a product of these matrices is oneDNN's."""
    plain = all(
        m.dtype == torch.float32 and m.device.type == "cpu" and m.numel() > 0 and type(m) in (Tensor, nn.Parameter)
        for m in matrices
    )
    return plain and has_onednn() and torch._C._get_mkldnn_enabled() and not torch.compiler.is_compiling()


def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """`left @ right`, without gradient."""
    if takes_onednn(left_MK, right_KN):
        return _product(left_MK, right_KN.T)
    return left_MK @ right_KN


def product_into(out_MN: Tensor, left_PK: Tensor, right_KN: Tensor) -> None:
    """Writes the first M rows of `left @ right`, without gradient."""
    if len(left_PK) == len(out_MN) and not takes_onednn(left_PK, right_KN):
        torch.mm(left_PK, right_KN, out=out_MN)
    else:
        out_MN.copy_(product(left_PK, right_KN)[: len(out_MN)])


def add_product(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """Adds `left @ right` to `total`, in its type, without gradient."""
    if left_MK.dtype == total_MN.dtype and not takes_onednn(left_MK, right_KN):
        total_MN.addmm_(left_MK, right_KN)
    else:
        total_MN.add_(product(left_MK, right_KN))


def linear(x: Tensor, weight_HD: Tensor, bias_H: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., D] to [..., H]."""
    if takes_onednn(x, weight_HD) and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x, weight_HD, bias_H)
    return F.linear(x, weight_HD, bias_H)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def padded(rows: int) -> int:
    """Rows that are multiplied in place of so many; those behind are to be zero.

    oneDNN compiles a kernel for every new size, for half a millisecond, and remembers a thousand. The rows of experts
    change from step to step: rounded up by 1/64 to 1/32 they have a few dozen sizes.
    """
    unit = max(8, 1 << max(0, rows.bit_length() - 6))
    return -(-rows // unit) * unit


def _product(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, bias_N, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_HD: Tensor, bias_H: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_HD)
        return _product(x.flatten(0, -2), weight_HD, bias_H).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_HD = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_TH = grads[0].flatten(0, -2)
        x_grad = product(grad_TH, weight_HD).view_as(x) if wants_x else None
        weight_grad = product(grad_TH.T, x.flatten(0, -2)) if wants_weight else None
        return x_grad, weight_grad, grad_TH.sum(0) if wants_bias else None
