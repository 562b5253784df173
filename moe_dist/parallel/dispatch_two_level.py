"""The two-level dispatcher: a token crosses to a node once, and from there to each of its ranks once.

Shape letters: T tokens here, D model width, K experts per token, M tokens received by this gateway, C choices received
with them, R rows at the experts here.

Links between nodes are slower than those inside. So a token goes once to each node that holds one of its kept experts,
to the rank with the same place in that node as its own (the gateway); the gateway brings it to the ranks there, takes
their sums, and sends one sum home.

    node 0            node 1: experts 4 5 on rank 2, 6 7 on rank 3            a token of rank 0, K = 3, experts 4 6 7

    rank 0 -- x, once --> rank 2 (gateway) -- itself -> g4*e4(x) ----------------+
                            |                                                    +--> one sum --> rank 0
                            +--------- x, once -> rank 3: g6*e6(x) + g7*e7(x) ---+

Both levels are the de-duplicated dispatcher: the outer one over ranks of the same place in their nodes, to which a node
is the owner of all of its experts; the inner one over the ranks of a node, on a plan which the gateway makes of the
choices that arrived. Source: DeepSeek-V3 (2024), section 3.2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.choices import Arrivals
from moe_dist.parallel.collectives import arrived_rows
from moe_dist.parallel.dispatch_by_token import TokenTicket
from moe_dist.parallel.dispatch_deduplicated import DeduplicatedDispatcher
from moe_dist.parallel.phases import Dispatched, Flight, PhasedDispatcher
from moe_dist.parallel.wire import ItemBytes, TwoLevelBytes, two_level_bytes


@dataclass(frozen=True)
class TwoLevelTicket:
    """The way there and back.

    Attributes:
        outer: Between this rank and the gateways of its tokens.
        slot_C: Slot `m*K + k` of every choice that came to this gateway.
        plan: Of the tokens that came to this gateway, over the experts of its node.
        inner: Between this gateway and the ranks of its node.
    """

    outer: TokenTicket
    slot_C: Tensor
    plan: RoutingPlan
    inner: TokenTicket


class TwoLevelDispatcher(PhasedDispatcher):
    """Brings tokens to nodes and, inside them, to ranks.

    Args:
        rail: Ranks of the same place in the nodes of one expert group, in order of node.
        node: Ranks of this node.
        experts_by_rank: Experts of every rank of the expert group, whose ranks stand node by node.
        weigh_input: Gate weights multiply what experts receive, not what they return.
    """

    def __init__(
        self,
        rail: dist.ProcessGroup,
        node: dist.ProcessGroup,
        experts_by_rank: list[range],
        weigh_input: bool = False,
    ) -> None:
        size, here = dist.get_world_size(node), dist.get_rank(rail)
        nodes = [experts_by_rank[first : first + size] for first in range(0, len(experts_by_rank), size)]
        self.outer = DeduplicatedDispatcher(rail, [range(ranks[0].start, ranks[-1].stop) for ranks in nodes])
        self.inner = DeduplicatedDispatcher(node, nodes[here], weigh_input)

    def announce(self, plan: RoutingPlan) -> TwoLevelTicket:
        outer = self.outer.announce(plan)
        slot_C = slots_of_choices(outer.arrivals, plan.row_TK.shape[1])
        here = plan_of_arrivals(outer.arrivals, slot_C, plan.row_TK.shape[1])
        return TwoLevelTicket(outer, slot_C, here, self.inner.announce(here))

    def launch(self, x_TD: Tensor, gate_TK: Tensor, ticket: TwoLevelTicket) -> Flight:
        flight = self.outer.launch(x_TD, gate_TK, ticket.outer)
        return Flight(ticket, flight.rows, flight.gates)

    def arrive(self, flight: Flight) -> Dispatched:
        ticket: TwoLevelTicket = flight.ticket
        gate_MK = self.gates_at_gateway(flight)
        inner = self.inner.arrive(self.inner.launch(arrived_rows(flight.rows), gate_MK, ticket.inner))
        return Dispatched(inner.rows_RD, inner.counts_L, (ticket, inner))

    def gates_at_gateway(self, flight: Flight) -> Tensor:
        """The gate weights that came with the choices, [M, K]; zero where a choice of a token went to another node."""
        ticket: TwoLevelTicket = flight.ticket
        gate_C = arrived_rows(flight.gates)
        slots = gate_C.new_zeros(ticket.plan.row_TK.numel())
        return slots.index_copy(0, ticket.slot_C, gate_C).view_as(ticket.plan.row_TK)

    def send_back(self, y_RD: Tensor, dispatched: Dispatched) -> Flight:
        ticket, inner = dispatched.ticket
        sums_MD = self.inner.collect(self.inner.send_back(y_RD, inner))
        return Flight(ticket, self.outer.send_sums(sums_MD, ticket.outer).rows)

    def collect(self, flight: Flight) -> Tensor:
        return self.outer.collect(Flight(flight.ticket.outer, flight.rows))

    def bytes_sent(self, ticket: TwoLevelTicket, item: ItemBytes) -> TwoLevelBytes:
        return two_level_bytes(ticket.outer.traffic, ticket.inner.traffic, item)


def slots_of_choices(arrivals: Arrivals, top_k: int) -> Tensor:
    """Slot `m*K + k` of every choice in order of arrival, where k counts the choices of token m that came here."""
    # Choices arrive by token; `order_R` says where each row's choice stood among them.
    token_C = torch.empty_like(arrivals.order_R)
    token_C[arrivals.order_R] = arrivals.fan.source_R
    rows_M = torch.bincount(token_C, minlength=arrivals.fan.place_M.numel())
    first_M = rows_M.cumsum(0) - rows_M
    place_C = torch.arange(token_C.numel(), device=token_C.device) - first_M[token_C]
    return token_C * top_k + place_C


def plan_of_arrivals(arrivals: Arrivals, slot_C: Tensor, top_k: int) -> RoutingPlan:
    """The plan of received tokens over the experts here; arrivals already stand by expert, then token."""
    slot_N = slot_C[arrivals.order_R]
    tokens = arrivals.fan.place_M.numel()
    row_MK, kept_MK = slot_N.new_zeros(tokens, top_k), slot_N.new_zeros(tokens, top_k, dtype=torch.bool)
    row_MK.view(-1)[slot_N] = torch.arange(slot_N.numel(), device=slot_N.device)
    kept_MK.view(-1)[slot_N] = True
    served_E = torch.tensor(arrivals.counts_L, device=slot_N.device)
    return RoutingPlan(slot_N, row_MK, kept_MK, served_E, served_E)
