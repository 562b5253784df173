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
from moe_dist.moe.product import padded, product, product_into, takes_onednn

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
        source = _Source.of(job, takes_onednn(x, first, down))
        kept = _Kept.empty(job)
        y_ND = x.new_empty(sum(job.counts_L), down.shape[2])

        def expert_forward(expert: int, rows: slice) -> None:
            active_RF = kept.fill(expert, source.take(x, rows), first[expert])
            product_into(y_ND[rows], active_RF, down[expert])

        _for_each_expert(expert_forward, job.counts_L, x.device)
        ctx.save_for_backward(x, gate_TK, first, down, *kept.hidden, *kept.by_product, *kept.active)
        ctx.job, ctx.source = job, source
        return y_ND if job.plan is None or gate_TK is None else weighted_sum(y_ND, gate_TK, job.plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        x, gate_TK, first, down, *buffers = ctx.saved_tensors
        job: Job = ctx.job
        source: _Source = ctx.source
        kept = _Kept.again(job, buffers)
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
            hidden_RH, active_RF, by_product = kept.read(expert, x_RD, first[expert])
            grad_active_RF = product(grad_RD, down[expert].T)
            if gate_N is not None and slope_N is not None:
                count = rows.stop - rows.start
                slope_N[rows] = torch.linalg.vecdot(active_RF, grad_active_RF)[:count]
                # The gate multiplies what is D wide, not what is F wide: here, and where `grad_rows` are summed.
                grad_RD[:count].mul_(gate_N[rows, None])
                x_RD[:count].mul_(gate_N[rows, None])
            product_into(grad_down[expert], active_RF.T, grad_RD)
            job.activation.backward(*job.parts(hidden_RH), by_product=by_product, grad_RF=grad_active_RF)
            # What is not needed again goes at once: wide experts would otherwise set the peak of a whole step.
            del active_RF, grad_RD, by_product, grad_active_RF
            product_into(grad_rows[rows], hidden_RH, first[expert])
            product_into(grad_first[expert], hidden_RH.T, x_RD)

        with torch.autocast(x.device.type, enabled=False):
            _for_each_expert(expert_backward, job.counts_L, x.device)
            if job.plan is None or slope_N is None or gate_TK is None:
                return grad_rows, None, grad_first, grad_down, None
            return weighted_sum(grad_rows, gate_TK, job.plan), job.plan.to_slots(slope_N), grad_first, grad_down, None


@dataclass(frozen=True)
class _Source:
    """Where an expert finds its rows: by their tokens, or where they lie; and whether rows of zeros stand behind them.

    A row of zeros stays one through every activation and adds nothing to a gradient.
    """

    token_N: Tensor | None
    pads: bool

    @staticmethod
    def of(job: Job, pads: bool) -> _Source:
        return _Source(None if job.plan is None else job.plan.token_N, pads)

    def take(self, x: Tensor, rows: slice) -> Tensor:
        """An expert's rows; the caller's to overwrite where they are gathered."""
        count = rows.stop - rows.start
        size = padded(count) if self.pads else count
        if size == count:
            return x[rows] if self.token_N is None else x.index_select(0, self.token_N[rows])
        taken = x.new_empty(size, x.shape[1])
        taken[count:].zero_()
        if self.token_N is None:
            taken[:count].copy_(x[rows])
        else:
            torch.index_select(x, 0, self.token_N[rows], out=taken[:count])
        return taken


@dataclass(frozen=True)
class _Kept:
    """What lies between forward and backward: nothing, the first product, or also its activation; by expert.

    Where the graph is kept for another backward, `read` hands out copies; else what was kept may be overwritten.
    """

    job: Job
    hidden: list[Tensor | None]
    by_product: list[Tensor | None]
    active: list[Tensor | None]
    copies: bool = False

    @staticmethod
    def empty(job: Job) -> _Kept:
        experts = len(job.counts_L)
        return _Kept(job, [None] * experts, [None] * experts, [None] * experts)

    @staticmethod
    def again(job: Job, buffers: list[Tensor | None]) -> _Kept:
        """What `fill` kept, in the backward."""
        experts = len(job.counts_L)
        hidden, by_product, active = (buffers[start : start + experts] for start in (0, experts, 2 * experts))
        return _Kept(job, hidden, by_product, active, torch._C._autograd._get_current_graph_task_keep_graph())

    def fill(self, expert: int, x_RD: Tensor, first_HD: Tensor) -> Tensor:
        """The activation of an expert's rows; what leads to it is kept as the job says."""
        hidden_RH = product(x_RD, first_HD.T)
        active_RF, by_product = self._activate(hidden_RH)
        if self.job.recompute != "projections":
            self.hidden[expert] = hidden_RH
        if self.job.recompute == "nothing":
            self.active[expert], self.by_product[expert] = active_RF, by_product
        return active_RF

    def read(self, expert: int, x_RD: Tensor, first_HD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(first product, activation, by-product) in the backward: where they were kept, or computed again.

        The first product is the caller's to overwrite.
        """
        hidden_RH, active_RF = self.hidden[expert], self.active[expert]
        if hidden_RH is None:
            hidden_RH = product(x_RD, first_HD.T)
        elif self.copies:
            hidden_RH = hidden_RH.clone()
        if active_RF is None:
            return hidden_RH, *self._activate(hidden_RH)
        return hidden_RH, active_RF, self.by_product[expert]

    def _activate(self, hidden_RH: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.job.activation.forward(*self.job.parts(hidden_RH))


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
