"""Stacked SwiGLU experts as grouped matrix products.

Shape letters: R rows, D model width, F expert width, L experts here, E experts.

Every expert e computes `down_e(silu(gate_e x) * up_e x)` (Shazeer 2020, SwiGLU) on its own rows. Back ends:
`loop` multiplies expert by expert into buffers allocated once, with a backward written by hand; `grouped` leaves the
product to `torch.nn.functional.grouped_mm`, which is one kernel on recent GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import MoEConfig


class Experts(nn.Module):
    """Some of a layer's experts, stacked.

    Attributes:
        expert_ids: Global ids of the experts held here, in order.
        gate_up: [L, D, 2F]; the first F columns are the gate, the others the up projection.
        down: [L, F, D].
    """

    def __init__(self, width: int, config: MoEConfig, expert_ids: range | None = None) -> None:
        super().__init__()
        self.expert_ids = range(config.num_experts) if expert_ids is None else expert_ids
        self.backend = config.backend
        held, inner = len(self.expert_ids), config.expert_width
        self.gate_up = nn.Parameter(torch.empty(held, width, 2 * inner))
        self.down = nn.Parameter(torch.empty(held, inner, width))

    def forward(self, rows_RD: Tensor, counts_L: list[int]) -> Tensor:
        """Applies expert l to its `counts_L[l]` rows; the rows are sorted by expert. Returns [R, D]."""
        kind = rows_RD.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.gate_up.dtype
        rows_RD, gate_up, down = (t.to(narrow) for t in (rows_RD, self.gate_up, self.down))
        with torch.autocast(kind, enabled=False):
            if choose_backend(self.backend, kind, narrow) == "grouped":
                return _grouped(rows_RD, gate_up, down, counts_L)
            return _ExpertLoop.apply(rows_RD, gate_up, down, counts_L)


def choose_backend(asked: str, device_type: str, dtype: torch.dtype) -> str:
    """The back end for a device and type: `grouped` where it is one kernel (CUDA, not fp64), otherwise `loop`."""
    if asked != "auto":
        return asked
    return "grouped" if device_type == "cuda" and dtype != torch.float64 else "loop"


def _grouped(rows_RD: Tensor, gate_up: Tensor, down: Tensor, counts_L: list[int]) -> Tensor:
    if rows_RD.shape[0] == 0:
        # No row reaches the kernel, yet every rank's weights get a (zero) gradient.
        return rows_RD + 0 * (gate_up.sum() + down.sum())
    ends_L = torch.tensor(counts_L, device=rows_RD.device).cumsum(0).to(torch.int32)
    gate_RF, up_RF = F.grouped_mm(rows_RD, gate_up, offs=ends_L).chunk(2, dim=-1)
    return _Contiguous.apply(F.grouped_mm(F.silu(gate_RF) * up_RF, down, offs=ends_L))


class _Contiguous(torch.autograd.Function):
    """Hands `grouped_mm` a dense gradient: it refuses an expanded (stride-0) one."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor) -> Tensor:
        return y_RD.view_as(y_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


class _ExpertLoop(torch.autograd.Function):
    """SwiGLU experts, one pair of products after the other, into buffers allocated once.

    The activation `silu(gate) * up` is computed again in the backward pass rather than kept: R x F less memory for an
    elementwise product.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gate_up: Tensor, down: Tensor, counts_L: list[int]) -> Tensor:
        hidden_R2F = rows_RD.new_empty(rows_RD.shape[0], gate_up.shape[2])
        for expert, rows in _spans(counts_L):
            torch.mm(rows_RD[rows], gate_up[expert], out=hidden_R2F[rows])
        gate_RF, up_RF = hidden_R2F.chunk(2, dim=-1)
        active_RF = F.silu(gate_RF).mul_(up_RF)
        out_RD = torch.empty_like(rows_RD)
        for expert, rows in _spans(counts_L):
            torch.mm(active_RF[rows], down[expert], out=out_RD[rows])
        ctx.save_for_backward(rows_RD, gate_up, down, hidden_R2F)
        ctx.counts_L = counts_L
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows_RD, gate_up, down, hidden_R2F = ctx.saved_tensors
        with torch.autocast(rows_RD.device.type, enabled=False):
            grad_RD = grads[0].contiguous()
            grad_hidden_R2F, grad_down = _down_backward(grad_RD, hidden_R2F, down, ctx.counts_L)
            grad_rows_RD = torch.empty_like(rows_RD)
            grad_gate_up = torch.zeros_like(gate_up)
            for expert, rows in _spans(ctx.counts_L):
                torch.mm(grad_hidden_R2F[rows], gate_up[expert].T, out=grad_rows_RD[rows])
                torch.mm(rows_RD[rows].T, grad_hidden_R2F[rows], out=grad_gate_up[expert])
        return grad_rows_RD, grad_gate_up, grad_down, None


def _down_backward(grad_RD: Tensor, hidden_R2F: Tensor, down: Tensor, counts_L: list[int]) -> tuple[Tensor, Tensor]:
    """Gradients of the gate/up products and of `down`, from the gradient of the experts' outputs."""
    gate_RF, up_RF = hidden_R2F.chunk(2, dim=-1)
    silu_RF = F.silu(gate_RF)
    active_RF = silu_RF * up_RF
    grad_active_RF = torch.empty_like(active_RF)
    grad_down = torch.zeros_like(down)
    for expert, rows in _spans(counts_L):
        torch.mm(grad_RD[rows], down[expert].T, out=grad_active_RF[rows])
        torch.mm(active_RF[rows].T, grad_RD[rows], out=grad_down[expert])
    grad_hidden_R2F = torch.empty_like(hidden_R2F)
    grad_gate_RF, grad_up_RF = grad_hidden_R2F.chunk(2, dim=-1)
    torch.mul(grad_active_RF, silu_RF, out=grad_up_RF)
    grad_gate_RF.copy_(torch.ops.aten.silu_backward(grad_active_RF.mul_(up_RF), gate_RF))
    return grad_hidden_R2F, grad_down


def _spans(counts_L: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    spans, start = [], 0
    for expert, count in enumerate(counts_L):
        if count:
            spans.append((expert, slice(start, start + count)))
        start += count
    return spans
