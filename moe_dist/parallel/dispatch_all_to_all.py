"""The plain all-to-all dispatcher: every kept choice of a token sends a row.

Shape letters: T tokens, D model width, K experts per token, N rows before the exchange, R rows received, W ranks of the
expert group, L experts here.

A row's way, on every rank at once:

    announce   each rank tells every other how many rows each expert gets (int64 [W, L])
    launch     rows sorted by expert are also sorted by owner, as ranks own neighbouring experts; they go out by an
               uneven all-to-all and arrive ordered by source, then by expert
    arrive     reorder to expert, then source: what the grouped product wants
               experts
    send_back  restore the order of arrival; the same exchange reversed
    collect    sum with the gate weights where the token lives
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.moe.dispatch import combine_rows, gather_rows, weigh_ahead
from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.collectives import arrived_rows, exchange_counts, start_rows
from moe_dist.parallel.phases import Dispatched, Flight, GroupDispatcher
from moe_dist.parallel.wire import ItemBytes, Traffic, WireBytes, plain_bytes


@dataclass(frozen=True)
class Ticket:
    """The way there and back of one exchange.

    Attributes:
        plan: The plan.
        traffic: Rows to and from each rank of the group; each goes out once for every choice.
        counts_L: Rows of each expert here.
        source_order_R: For every arranged row, its place in order of arrival.
        arranged_order_R: The inverse.
    """

    plan: RoutingPlan
    traffic: Traffic
    counts_L: list[int]
    source_order_R: Tensor
    arranged_order_R: Tensor


class AllToAllDispatcher(GroupDispatcher):
    """Brings every row to the rank that holds its expert, over one expert group."""

    def announce(self, plan: RoutingPlan) -> Ticket:
        counts_WL = exchange_counts(plan.rows_E, self.sizes, self.group)
        sent = [int(part.sum()) for part in plan.rows_E.split(self.sizes)]
        received = counts_WL.sum(1).tolist()
        traffic = Traffic(dist.get_rank(self.group), sent, received, sent, received)
        order_R = arrange_by_expert(counts_WL)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        return Ticket(plan, traffic, counts_WL.sum(0).tolist(), order_R, inverse_R)

    def launch(self, x_TD: Tensor, gate_TK: Tensor, ticket: Ticket) -> Flight:
        rows_ND, traffic = gather_rows(x_TD, ticket.plan), ticket.traffic
        if self.weigh_input:
            rows_ND, gate_TK = weigh_ahead(rows_ND, gate_TK, ticket.plan)
        rows = start_rows(rows_ND, traffic.tokens_out, traffic.tokens_in, self.group)
        return Flight(ticket, rows, gate_TK)

    def arrive(self, flight: Flight) -> Dispatched:
        ticket: Ticket = flight.ticket
        rows_RD = _reorder(arrived_rows(flight.rows), ticket.source_order_R, ticket.arranged_order_R)
        return Dispatched(rows_RD, ticket.counts_L, (ticket, flight.gates))

    def send_back(self, y_RD: Tensor, dispatched: Dispatched) -> Flight:
        ticket, gate_TK = dispatched.ticket
        leaving_RD = _reorder(y_RD, ticket.arranged_order_R, ticket.source_order_R)
        rows = start_rows(leaving_RD, ticket.traffic.tokens_in, ticket.traffic.tokens_out, self.group)
        return Flight(ticket, rows, gate_TK)

    def collect(self, flight: Flight) -> Tensor:
        return combine_rows(arrived_rows(flight.rows), flight.gates, flight.ticket.plan)

    def bytes_sent(self, ticket: Ticket, item: ItemBytes) -> WireBytes:
        return plain_bytes(ticket.traffic, self.sizes, item)


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
