"""The `loop` back end: expert by expert, each taken through both products while its rows are in the cache.

Shape letters: T tokens, K experts per token, N = R rows, D width, F expert width, H columns of the first product,
L experts here.

Two ways in share one function. Rows that an exchange has sorted by expert are read as they lie. Where all experts are
here, an expert gathers its own rows from the tokens in its turn, so that neither the gathered rows nor their weighted
gradients ever exist for all experts at once, and the outputs of experts need not be kept: with y = a W and the gradient
g of the token, the gradient of the gate is `<g, y> = <g W^T, a>`, whose factors the backward has anyway
(as SonicMoE does, arXiv 2512.14080).
"""

from __future__ import annotations

import functools
import heapq
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.moe.activation import Activation
from moe_dist.moe.dispatch import weighted_sum
from moe_dist.moe.plan import RoutingPlan

_IDLE_FRACTION = 0.1  # of the threads' time that may be lost to an expert that outlasts the others


@dataclass(frozen=True)
class Job:
    """What the loop is to do.

    Attributes:
        counts_L: Rows of each expert.
        activation: Between the products.
        recompute: What the backward computes again: `nothing`, `activation` or `projections`.
        plan: Where the rows lie in the tokens; None for rows sorted by expert.
    """

    counts_L: list[int]
    activation: Activation
    recompute: str
    plan: RoutingPlan | None = None

    def parts(self, hidden_RH: Tensor) -> tuple[Tensor, ...]:
        """The first product by parts of F columns."""
        return hidden_RH.chunk(self.activation.parts, dim=1)


def loop_rows(rows_RD: Tensor, first: Tensor, down: Tensor, job: Job) -> Tensor:
    """Expert l on its rows; [R, D]."""
    return _ExpertLoop.apply(rows_RD, None, first, down, job)


def loop_tokens(x_TD: Tensor, gate_TK: Tensor, first: Tensor, down: Tensor, job: Job) -> Tensor:
    """Gathers, computes and sums by gate: the whole way of the tokens where all experts are here; [T, D]."""
    return _ExpertLoop.apply(x_TD, gate_TK, first, down, job)


class _ExpertLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_TK: Tensor | None, first: Tensor, down: Tensor, job: Job) -> Tensor:
        source = _Source.of(job)
        kept = _Kept.empty(x, first, down, job)
        y_ND = x.new_empty(sum(job.counts_L), down.shape[2])

        def expert_forward(expert: int, rows: slice) -> None:
            active_RF = kept.fill(source.take(x, rows), first[expert], rows)
            torch.mm(active_RF, down[expert], out=y_ND[rows])

        _for_each_expert(expert_forward, job.counts_L, x.device)
        ctx.save_for_backward(x, gate_TK, first, down, kept.hidden, kept.by_product, kept.active)
        ctx.job = job
        return y_ND if job.plan is None or gate_TK is None else weighted_sum(y_ND, gate_TK, job.plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        x, gate_TK, first, down, *buffers = ctx.saved_tensors
        job: Job = ctx.job
        source, kept = _Source.of(job), _Kept.again(job, buffers)
        grad_out = grads[0].contiguous()
        gate_N = None if gate_TK is None or job.plan is None else job.plan.of_rows(gate_TK)
        slope_N = None if gate_N is None else torch.empty_like(gate_N)
        grad_rows = x.new_empty(sum(job.counts_L), x.shape[1])
        grad_first, grad_down = torch.empty_like(first), torch.empty_like(down)
        for expert, count in enumerate(job.counts_L):
            if not count:
                grad_first[expert].zero_()
                grad_down[expert].zero_()

        def expert_backward(expert: int, rows: slice) -> None:
            x_RD, grad_RD = source.take(x, rows), source.take(grad_out, rows)
            hidden_RH, active_RF, by_product = kept.read(x_RD, first[expert], rows)
            grad_active_RF = grad_RD @ down[expert].T
            if gate_N is not None and slope_N is not None:
                slope_N[rows] = torch.linalg.vecdot(active_RF, grad_active_RF)
                # The gate multiplies what is D wide, not what is F wide: here, and where `grad_rows` are summed.
                grad_RD.mul_(gate_N[rows, None])
                x_RD.mul_(gate_N[rows, None])
            torch.mm(active_RF.T, grad_RD, out=grad_down[expert])
            job.activation.backward(*job.parts(hidden_RH), by_product=by_product, grad_RF=grad_active_RF)
            # What is not needed again goes at once: wide experts would otherwise set the peak of a whole step.
            del active_RF, grad_RD, by_product, grad_active_RF
            torch.mm(hidden_RH, first[expert], out=grad_rows[rows])
            torch.mm(hidden_RH.T, x_RD, out=grad_first[expert])

        with torch.autocast(x.device.type, enabled=False):
            _for_each_expert(expert_backward, job.counts_L, x.device)
            if job.plan is None or slope_N is None or gate_TK is None:
                return grad_rows, None, grad_first, grad_down, None
            return weighted_sum(grad_rows, gate_TK, job.plan), job.plan.to_slots(slope_N), grad_first, grad_down, None


@dataclass(frozen=True)
class _Source:
    """Where an expert finds its rows: by their tokens, or where they lie."""

    token_N: Tensor | None

    @staticmethod
    def of(job: Job) -> _Source:
        return _Source(None if job.plan is None else job.plan.token_N)

    def take(self, x: Tensor, rows: slice) -> Tensor:
        return x[rows] if self.token_N is None else x.index_select(0, self.token_N[rows])


@dataclass(frozen=True)
class _Kept:
    """What lies between forward and backward: nothing, the first product, or also its activation.

    Where the graph is kept for another backward, `read` hands out copies; else what was kept may be overwritten.
    """

    job: Job
    hidden: Tensor | None = None
    by_product: Tensor | None = None
    active: Tensor | None = None
    copies: bool = False

    @staticmethod
    def empty(x: Tensor, first: Tensor, down: Tensor, job: Job) -> _Kept:
        rows = sum(job.counts_L)
        hidden = by_product = active = None
        if job.recompute != "projections":
            hidden = x.new_empty(rows, first.shape[1])
        if job.recompute == "nothing":
            active = x.new_empty(rows, down.shape[1])
            by_product = torch.empty_like(active) if job.activation.parts == 2 else None
        return _Kept(job, hidden, by_product, active)

    @staticmethod
    def again(job: Job, buffers: list[Tensor | None]) -> _Kept:
        """What `empty` made, in the backward."""
        hidden, by_product, active = buffers
        return _Kept(job, hidden, by_product, active, torch._C._autograd._get_current_graph_task_keep_graph())

    def fill(self, x_RD: Tensor, first_HD: Tensor, rows: slice) -> Tensor:
        """The activation of an expert's rows; what leads to it is kept as the job says."""
        active_RF, by_product = self._activate(self._product(x_RD, first_HD, rows))
        if self.active is not None:
            self.active[rows] = active_RF
        if self.by_product is not None and by_product is not None:
            self.by_product[rows] = by_product
        return active_RF

    def read(self, x_RD: Tensor, first_HD: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """(first product, activation, by-product) in the backward: where they were kept, or computed again.

        The first product is the caller's to overwrite.
        """
        if self.hidden is None:
            hidden_RH = self._product(x_RD, first_HD, rows)
        else:
            hidden_RH = self.hidden[rows].clone() if self.copies else self.hidden[rows]
        if self.active is None:
            return hidden_RH, *self._activate(hidden_RH)
        return hidden_RH, self.active[rows], None if self.by_product is None else self.by_product[rows]

    def _activate(self, hidden_RH: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.job.activation.forward(*self.job.parts(hidden_RH))

    def _product(self, x_RD: Tensor, first_HD: Tensor, rows: slice) -> Tensor:
        """The first product, written where it is kept."""
        if self.hidden is None:
            return x_RD @ first_HD.T
        return torch.mm(x_RD, first_HD.T, out=self.hidden[rows])


def _for_each_expert(work: Callable[[int, slice], None], counts_L: list[int], device: torch.device) -> None:
    """Calls `work(expert, its rows)` for every expert that has rows.

    On a CPU with several threads each takes whole experts, where that keeps all of them busy: products side by side are
    faster than each of them cut into pieces. Experts write to separate rows, so the result does not depend on who takes
    which.
    """
    spans = sorted(_spans(counts_L), key=lambda span: span[1].start - span[1].stop)  # the largest first
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not _keeps_busy([rows.stop - rows.start for _, rows in spans], threads):
        for expert, rows in spans:
            work(expert, rows)
        return
    queue = iter(spans)

    def take_experts() -> None:
        with torch.no_grad():
            # `next` on a list iterator is one step of the interpreter: no two threads get the same expert.
            for expert, rows in queue:
                work(expert, rows)

    for taken in [_single_threads(threads).submit(take_experts) for _ in range(threads)]:
        taken.result()


def _keeps_busy(rows_of_experts: list[int], threads: int) -> bool:
    """Whether threads that take experts, the largest first, end at about the same time."""
    taken = [0] * threads
    for rows in rows_of_experts:
        heapq.heapreplace(taken, taken[0] + rows)
    return max(taken) * threads * (1 - _IDLE_FRACTION) <= sum(taken)


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
