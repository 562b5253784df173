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

# Experts side by side pay where there are many, or few that are wide; measured, see docs/log.md.
EXPERTS_PER_THREAD, WIDE_EXPERTS_PER_THREAD, WIDE = 16, 4, 1024


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

        _for_each_expert(expert_forward, job.counts_L, down)
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
            parts_RF, active_RF, by_product = kept.read(x_RD, first[expert], rows)
            grad_active_RF = grad_RD @ down[expert].T
            if gate_N is not None and slope_N is not None:
                slope_N[rows] = torch.linalg.vecdot(active_RF, grad_active_RF)
                # The gate multiplies what is D wide, not what is F wide: here, and where `grad_rows` are summed.
                grad_RD.mul_(gate_N[rows, None])
                x_RD.mul_(gate_N[rows, None])
            torch.mm(active_RF.T, grad_RD, out=grad_down[expert])
            grads_RF = job.activation.backward(*parts_RF, by_product=by_product, grad_RF=grad_active_RF)
            # What is not needed again goes at once: wide experts would otherwise set the peak of a whole step.
            del parts_RF, active_RF, grad_RD, by_product, grad_active_RF
            beta = 0
            while grads_RF:
                grad_RF = grads_RF.pop()
                part = slice(len(grads_RF) * grad_RF.shape[1], (len(grads_RF) + 1) * grad_RF.shape[1])
                torch.addmm(grad_rows[rows], grad_RF, first[expert, part], beta=beta, out=grad_rows[rows])
                torch.mm(grad_RF.T, x_RD, out=grad_first[expert, part])
                beta = 1

        with torch.autocast(x.device.type, enabled=False):
            _for_each_expert(expert_backward, job.counts_L, down)
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
        shape_NF = (sum(job.counts_L), down.shape[1])
        hidden = by_product = active = None
        if job.recompute != "projections":
            hidden = x.new_empty(job.activation.parts, *shape_NF)
        if job.recompute == "nothing":
            active = x.new_empty(shape_NF)
            by_product = torch.empty_like(active) if job.activation.parts == 2 else None
        return _Kept(job, hidden, by_product, active)

    @staticmethod
    def again(job: Job, buffers: list[Tensor | None]) -> _Kept:
        """What `empty` made, in the backward."""
        hidden, by_product, active = buffers
        return _Kept(job, hidden, by_product, active, torch._C._autograd._get_current_graph_task_keep_graph())

    def fill(self, x_RD: Tensor, first_HD: Tensor, rows: slice) -> Tensor:
        """The activation of an expert's rows; what leads to it is kept as the job says."""
        active_RF, by_product = self.job.activation.forward(*self._parts(x_RD, first_HD, rows))
        if self.active is not None:
            self.active[rows] = active_RF
        if self.by_product is not None and by_product is not None:
            self.by_product[rows] = by_product
        return active_RF

    def read(self, x_RD: Tensor, first_HD: Tensor, rows: slice) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """(first product, activation, by-product) in the backward: where they were kept, or computed again.

        First product and by-product are the caller's to overwrite.
        """
        if self.hidden is None:
            parts_RF = self._parts(x_RD, first_HD, rows)
        else:
            parts_RF = [self._own(part_NF[rows]) for part_NF in self.hidden]
        if self.active is None:
            return parts_RF, *self.job.activation.forward(*parts_RF)
        by_product = None if self.by_product is None else self._own(self.by_product[rows])
        return parts_RF, self.active[rows], by_product

    def _own(self, kept: Tensor) -> Tensor:
        return kept.clone() if self.copies else kept

    def _parts(self, x_RD: Tensor, first_HD: Tensor, rows: slice) -> list[Tensor]:
        """The first product, F columns a part, written where it is kept."""
        weights_FD = first_HD.chunk(self.job.activation.parts)
        if self.hidden is None:
            return [x_RD @ weight_FD.T for weight_FD in weights_FD]
        kept_NF = zip(weights_FD, self.hidden, strict=True)
        return [torch.mm(x_RD, weight_FD.T, out=part_NF[rows]) for weight_FD, part_NF in kept_NF]


def _for_each_expert(work: Callable[[int, slice], None], counts_L: list[int], down: Tensor) -> None:
    """Calls `work(expert, its rows)` for every expert that has rows.

    On a CPU with several threads and enough experts, each thread takes whole experts: many small products side by side
    are faster than each of them cut into pieces. Experts write to separate rows, so the result does not depend on who
    takes which.
    """
    spans = _spans(counts_L)
    threads = torch.get_num_threads()
    enough = threads * (WIDE_EXPERTS_PER_THREAD if down.shape[1] >= WIDE else EXPERTS_PER_THREAD)
    if down.device.type != "cpu" or threads == 1 or len(spans) < enough:
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
