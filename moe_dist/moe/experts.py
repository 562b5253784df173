"""Stacked SwiGLU experts as grouped matrix products.

Shape letters: R rows, D model width, F expert width, L experts here, E experts.

Every expert e computes `down_e(silu(gate_e x) * up_e x)` (Shazeer 2020, SwiGLU) on its own rows. Back ends:
`loop` multiplies expert by expert into buffers allocated once, with a backward written by hand; `grouped` leaves the
product to `torch.nn.functional.grouped_mm`, which is one kernel on recent GPUs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import MoEConfig

EXPERTS_PER_THREAD = 4


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
            if choose_backend(self.backend, gate_up, down) == "grouped":
                return _grouped(rows_RD, gate_up, down, counts_L)
            return _ExpertLoop.apply(rows_RD, gate_up, down, counts_L)


def choose_backend(asked: str, gate_up: Tensor, down: Tensor) -> str:
    """The back end for some weights: `grouped` where it is one kernel (CUDA, no fp64, whole 16 bytes), else `loop`."""
    if asked != "auto":
        return asked
    whole_rows = all(weight.shape[-1] * weight.element_size() % 16 == 0 for weight in (gate_up, down))
    return "grouped" if down.device.type == "cuda" and down.dtype != torch.float64 and whole_rows else "loop"


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
    """SwiGLU experts, each taken through both products while its rows are in the cache; a backward written by hand.

    The activation `silu(gate) * up` is computed again in the backward pass rather than kept: R x F less memory for an
    elementwise product.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gate_up: Tensor, down: Tensor, counts_L: list[int]) -> Tensor:
        hidden_R2F = rows_RD.new_empty(rows_RD.shape[0], gate_up.shape[2])
        out_RD = torch.empty_like(rows_RD)

        def expert_forward(expert: int, rows: slice) -> None:
            hidden_2F = torch.mm(rows_RD[rows], gate_up[expert], out=hidden_R2F[rows])
            gate_F, up_F = hidden_2F.chunk(2, dim=-1)
            torch.mm(F.silu(gate_F).mul_(up_F), down[expert], out=out_RD[rows])

        _for_each_expert(expert_forward, counts_L, rows_RD.device)
        ctx.save_for_backward(rows_RD, gate_up, down, hidden_R2F)
        ctx.counts_L = counts_L
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows_RD, gate_up, down, hidden_R2F = ctx.saved_tensors
        grad_RD = grads[0].contiguous()
        grad_rows_RD = torch.empty_like(rows_RD)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for expert, count in enumerate(ctx.counts_L):
            if not count:
                grad_gate_up[expert].zero_()
                grad_down[expert].zero_()

        def expert_backward(expert: int, rows: slice) -> None:
            active_F, grad_hidden_2F = _activation_backward(hidden_R2F[rows], grad_RD[rows] @ down[expert].T)
            torch.mm(active_F.T, grad_RD[rows], out=grad_down[expert])
            torch.mm(grad_hidden_2F, gate_up[expert].T, out=grad_rows_RD[rows])
            torch.mm(rows_RD[rows].T, grad_hidden_2F, out=grad_gate_up[expert])

        with torch.autocast(rows_RD.device.type, enabled=False):
            _for_each_expert(expert_backward, ctx.counts_L, rows_RD.device)
        return grad_rows_RD, grad_gate_up, grad_down, None


def _activation_backward(hidden_2F: Tensor, grad_active_F: Tensor) -> tuple[Tensor, Tensor]:
    """`silu(gate) * up` once more, and the gradient of [gate, up] from that of the activation."""
    gate_F, up_F = hidden_2F.chunk(2, dim=-1)
    silu_F = F.silu(gate_F)
    grad_hidden_2F = torch.empty_like(hidden_2F)
    grad_gate_F, grad_up_F = grad_hidden_2F.chunk(2, dim=-1)
    torch.mul(grad_active_F, silu_F, out=grad_up_F)
    grad_gate_F.copy_(torch.ops.aten.silu_backward(grad_active_F.mul_(up_F), gate_F))
    return silu_F.mul_(up_F), grad_hidden_2F


def _for_each_expert(work: Callable[[int, slice], None], counts_L: list[int], device: torch.device) -> None:
    """Calls `work(expert, its rows)` for every expert that has rows.

    On a CPU with several threads and enough experts, each thread takes whole experts: many small products side by side
    are faster than each of them cut into pieces. Experts write to separate rows, so the result does not depend on who
    takes which.
    """
    spans = _spans(counts_L)
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(spans) < EXPERTS_PER_THREAD * threads:
        for expert, rows in spans:
            work(expert, rows)
        return
    queue = iter(sorted(spans, key=lambda span: span[1].start - span[1].stop))  # the largest first

    def take_experts() -> None:
        with torch.no_grad():
            # `next` on a list iterator is one step of the interpreter: no two threads get the same expert.
            for expert, rows in queue:
                work(expert, rows)

    for taken in [_single_threads(threads).submit(take_experts) for _ in range(threads)]:
        taken.result()


@functools.cache
def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one thread each; made once a process."""
    ready = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first question sets it up; asked later, that would undo the next line
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(count, "expert", initializer=start)
    for _ in range(count):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(count)  # the setting of threads still to come, which `start` changed for all
    return pool


def _spans(counts_L: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    spans, start = [], 0
    for expert, count in enumerate(counts_L):
        if count:
            spans.append((expert, slice(start, start + count)))
        start += count
    return spans
