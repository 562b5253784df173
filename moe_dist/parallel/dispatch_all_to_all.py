"""The plain all-to-all dispatcher: every kept choice of a token sends a row.

Shape letters: T tokens, D model width, K experts per token, N rows before the exchange, R rows received, W ranks of the
expert group, L experts here.

A row's way, on every rank at once:

    1  gather     rows sorted by expert are also sorted by owner, as ranks own neighbouring experts
    2  announce   each rank tells every other how many rows each expert gets (int64 [W, L])
    3  exchange   uneven all-to-all; rows arrive ordered by source, then by expert
    4  arrange    reorder to expert, then source: what the grouped product wants
    5  experts
    6  restore, exchange back, combine with the gate weights where the token lives
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.moe.dispatch import ApplyExperts, Dispatched, Journey, combine_rows, gather_rows
from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.collectives import all_to_all_rows, exchange_counts
from moe_dist.parallel.wire import ItemBytes, Traffic, WireBytes, plain_bytes


@dataclass(frozen=True)
class Ticket:
    """The way back of one exchange.

    Attributes:
        sent: Rows that went to each rank of the group.
        received: Rows that came from each.
        source_order_R: For every arranged row, its place in order of arrival.
        arranged_order_R: The inverse.
    """

    sent: list[int]
    received: list[int]
    source_order_R: Tensor
    arranged_order_R: Tensor


class AllToAllDispatcher:
    """Brings every row to the rank that holds its expert, over one expert group."""

    def __init__(self, group: dist.ProcessGroup, experts_by_rank: list[range]) -> None:
        self.group = group
        self.sizes = [len(experts) for experts in experts_by_rank]

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Dispatched:
        counts_WL = exchange_counts(plan.served_E, self.sizes, self.group)
        sent = [int(part.sum()) for part in plan.served_E.split(self.sizes)]
        received = counts_WL.sum(1).tolist()
        order_R = arrange_by_expert(counts_WL)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        arrived_RD = all_to_all_rows(gather_rows(x_TD, plan), sent, received, self.group)
        ticket = Ticket(sent, received, order_R, inverse_R)
        return Dispatched(_reorder(arrived_RD, order_R, inverse_R), counts_WL.sum(0).tolist(), ticket)

    def combine(self, y_RD: Tensor, gate_TK: Tensor, plan: RoutingPlan, dispatched: Dispatched) -> Tensor:
        ticket: Ticket = dispatched.ticket
        leaving_RD = _reorder(y_RD, ticket.arranged_order_R, ticket.source_order_R)
        y_ND = all_to_all_rows(leaving_RD, ticket.received, ticket.sent, self.group)
        return combine_rows(y_ND, gate_TK, plan)

    def run(self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan, experts: ApplyExperts) -> tuple[Tensor, Journey]:
        dispatched = self.dispatch(x_TD, plan)
        y_RD = experts(dispatched.rows_RD, dispatched.counts_L)
        item = ItemBytes.of(x_TD, y_RD, gate_TK)
        journey = Journey(y_RD.shape[0], self.bytes_sent(dispatched, item).total)
        return self.combine(y_RD, gate_TK, plan, dispatched), journey

    def traffic(self, dispatched: Dispatched) -> Traffic:
        """The counts of one exchange; a token's row goes out once for every choice."""
        ticket: Ticket = dispatched.ticket
        return Traffic(dist.get_rank(self.group), ticket.sent, ticket.received, ticket.sent, ticket.received)

    def bytes_sent(self, dispatched: Dispatched, item: ItemBytes) -> WireBytes:
        """Bytes that this rank sends to others in the forward pass."""
        return plain_bytes(self.traffic(dispatched), self.sizes, item)


def arrange_by_expert(counts_WL: Tensor) -> Tensor:
    """The permutation from (source, expert) order to (expert, source) order.

    Example with two sources and two experts, counts [[2, 1], [1, 3]]:

        arrival   0 1 | 2    3 | 4 5 6      source 0: expert 0, expert 1; source 1: expert 0, expert 1
        arranged  0 1   3  | 2   4 5 6      expert 0: from source 0, 1;   expert 1: from source 0, 1
    """
    sources, experts = counts_WL.shape
    expert_of_row = torch.arange(experts, device=counts_WL.device).repeat(sources)
    expert_of_row = expert_of_row.repeat_interleave(counts_WL.reshape(-1))
    return torch.sort(expert_of_row, stable=True).indices


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order_R, inverse_R)
        return rows_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        _, inverse_R = ctx.saved_tensors
        return grads[0].index_select(0, inverse_R), None, None


def _reorder(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """`out[i] = rows[order[i]]`, with a gather in place of a scatter on the way back."""
    return _Reorder.apply(rows_RD, order_R, inverse_R)
