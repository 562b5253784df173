"""Bringing tokens to experts and back: the `Dispatcher` protocol and the one-device dispatcher.

Shape letters: T tokens, D model width, K experts per token, N rows before any exchange, R rows at the experts,
L experts here, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.plan import RoutingPlan

ROWS_IN_CACHE = 1024  # 2 MB at width 512 in fp32


# Applies expert l to its `counts_L[l]` rows of [R, D], which are sorted by expert.
ApplyExperts = Callable[[Tensor, list[int]], Tensor]


@dataclass(frozen=True)
class Journey:
    """What one forward of a layer cost this rank.

    Attributes:
        rows: Rows that the experts here computed.
        bytes_sent: Bytes sent to other ranks, both ways.
    """

    rows: int
    bytes_sent: int = 0


class Dispatcher(Protocol):
    """Moves rows to the experts and weighted sums back to the tokens."""

    def run(
        self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan, experts: ApplyExperts
    ) -> tuple[Tensor, Journey]: ...


class LocalDispatcher:
    """All experts are here: rows are gathered by expert and summed back by token.

    Gate weights multiply what experts return or, with `weigh_input`, what they receive.
    """

    def __init__(self, weigh_input: bool = False) -> None:
        self.weigh_input = weigh_input

    def run(self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan, experts: ApplyExperts) -> tuple[Tensor, Journey]:
        rows_ND = gather_rows(x_TD, plan)
        if self.weigh_input:
            rows_ND, gate_TK = weigh_ahead(rows_ND, gate_TK, plan)
        y_ND = experts(rows_ND, plan.rows_E.tolist())
        return combine_rows(y_ND, gate_TK, plan), Journey(rows_ND.shape[0])


def weigh_ahead(rows_ND: Tensor, gate_TK: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """Rows times their gate weights, and the weights that are left for the sum of results: ones."""
    return weigh_rows(rows_ND, plan.of_rows(gate_TK)), torch.ones_like(gate_TK)


def weigh_rows(rows_RD: Tensor, weight_R: Tensor) -> Tensor:
    """`weight[r] * rows[r]`, multiplied in the wider of the two types, in the type of `rows_RD`."""
    return (rows_RD * weight_R[:, None]).to(rows_RD.dtype)


def gather_rows(x_TD: Tensor, plan: RoutingPlan) -> Tensor:
    """`rows[n] = x[token_N[n]]`, [N, D]. The gradient of a token is summed in the order of its choices."""
    return _GatherRows.apply(x_TD, plan)


def combine_rows(y_ND: Tensor, gate_TK: Tensor, plan: RoutingPlan) -> Tensor:
    """`out[t] = sum_k gate[t, k] * y[row_TK[t, k]]` over kept choices, [T, D] in the type of `y_ND`.

    The sum is made in the wider of the two types and always in the order of choices, so that it is the same on every
    run and every layout; a scatter-add would not be on a GPU.
    """
    return _CombineRows.apply(y_ND, gate_TK, plan)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        ctx.plan = plan
        rows_ND = x_TD.index_select(0, plan.token_N)
        return rows_ND if plan.rows_each is None else rows_ND.masked_fill_(plan.slot_N[:, None] < 0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        plan: RoutingPlan = ctx.plan
        ones = torch.ones_like(plan.row_TK, dtype=grads[0].dtype)
        return weighted_sum(grads[0], ones, plan), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, gate_TK: Tensor, plan: RoutingPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y_ND, gate_TK)
        wide = torch.promote_types(y_ND.dtype, gate_TK.dtype)
        return weighted_sum(y_ND, gate_TK.to(wide), plan).to(y_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        plan: RoutingPlan = ctx.plan
        y_ND, gate_TK = ctx.saved_tensors
        grad_TD = grads[0]
        gate_N = plan.of_rows(gate_TK)
        grad_ND = torch.empty_like(y_ND)
        slope_N = torch.empty_like(gate_N)
        token_N = plan.token_N
        with torch.autocast(grad_TD.device.type, enabled=False):
            for rows in _pieces(grad_ND.shape[0], grad_TD.device):
                picked = grad_TD.index_select(0, token_N[rows])
                slope_N[rows] = torch.linalg.vecdot(picked.to(gate_N.dtype), y_ND[rows].to(gate_N.dtype))
                grad_ND[rows] = picked * gate_N[rows, None]
        return grad_ND, plan.to_slots(slope_N), None


def weighted_sum(rows_ND: Tensor, weight_TK: Tensor, plan: RoutingPlan) -> Tensor:
    """`sum_k weight[t, k] * rows[row_TK[t, k]]` over kept choices in their order, in the type of `weight_TK`."""
    if rows_ND.dtype == weight_TK.dtype and rows_ND.shape[0]:
        return _bags(rows_ND, weight_TK, plan)
    tokens, top_k = plan.row_TK.shape
    out_TD = rows_ND.new_zeros((tokens, rows_ND.shape[1]), dtype=weight_TK.dtype)
    if rows_ND.shape[0] == 0:
        return out_TD
    for part in _pieces(tokens, rows_ND.device):
        for choice in range(top_k):
            picked_TD = rows_ND.index_select(0, plan.row_TK[part, choice]).to(out_TD.dtype)
            if not plan.keeps_all:
                picked_TD.masked_fill_(~plan.kept_TK[part, choice, None], 0)
            out_TD[part].addcmul_(picked_TD, weight_TK[part, choice, None])
            del picked_TD  # before the next is picked
    return out_TD


def _bags(rows_ND: Tensor, weight_TK: Tensor, plan: RoutingPlan) -> Tensor:
    """`weighted_sum` in one kernel, which takes rows and weights of one type only; it sums in the same order."""
    if plan.keeps_all:
        return F.embedding_bag(plan.row_TK, rows_ND, mode="sum", per_sample_weights=weight_TK)
    count_T = plan.kept_TK.sum(-1)
    start_T = count_T.cumsum(0) - count_T
    kept_N = plan.row_TK[plan.kept_TK]
    return F.embedding_bag(kept_N, rows_ND, start_T, mode="sum", per_sample_weights=weight_TK[plan.kept_TK])


def _pieces(count: int, device: torch.device) -> list[slice]:
    """Rows in pieces that stay in a CPU's cache from one operation to the next; in one piece elsewhere."""
    size = ROWS_IN_CACHE if device.type == "cpu" else max(count, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
