"""What the all-gather and the de-duplicated dispatcher share: tokens travel, not rows.

Shape letters: T tokens here, D model width, K experts per token, N kept choices here, W ranks of the expert group,
L experts here, M tokens received, R rows at the experts.

On every rank at once:

    1  announce   two counts for every rank: tokens and choices                          int64 [W, 2]
    2  exchange   the choices, one integer each, and the tokens                          int64 [N], [., D]
    3  fan out    each received token becomes a row for each of its experts here         [M, D] -> [R, D]
    4  experts
    5  fan in     the gate weights follow; rows times gates are summed by token          [R, D] -> [M, D]
    6  exchange   one row for every received token goes home                             [M, D]
    7  sum        over the ranks a token went to, in their order                         [., D] -> [T, D]

The gate's gradient is computed at step 5, where the expert's output lives, and travels back as step 5's weights came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.moe.dispatch import ApplyExperts, Dispatched, Journey
from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.choices import Arrivals, Departures, arrange_arrivals, encode_choices
from moe_dist.parallel.collectives import all_to_all_rows, exchange_integers
from moe_dist.parallel.fan import Fan, fan_in, fan_out
from moe_dist.parallel.wire import ItemBytes, Traffic, WireBytes, token_bytes


@dataclass(frozen=True)
class TokenTicket:
    """The way back of one exchange.

    Attributes:
        traffic: Tokens and choices to and from each rank of the group.
        departures: This rank's choices, by owner.
        arrivals: The rows here.
        home: From tokens to their crossings (ordered by rank, then token), where not every token goes everywhere.
    """

    traffic: Traffic
    departures: Departures
    arrivals: Arrivals
    home: Fan | None = None


class TokenDispatcher(ABC):
    """Brings tokens with their choices to ranks and one gate-weighted sum per token and rank home."""

    def __init__(self, group: dist.ProcessGroup, experts_by_rank: list[range]) -> None:
        self.group = group
        self.sizes = [len(experts) for experts in experts_by_rank]

    @abstractmethod
    def send(self, x_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, TokenTicket]:
        """Announces and sends; returns the tokens received [M, D], by source, and the ticket."""

    @abstractmethod
    def sum_at_home(self, returned: Tensor, ticket: TokenTicket) -> Tensor:
        """Sums what came back from the ranks, ordered by rank, to [T, D]."""

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Dispatched:
        tokens_MD, ticket = self.send(x_TD, plan)
        return Dispatched(fan_out(tokens_MD, ticket.arrivals.fan), ticket.arrivals.counts_L, ticket)

    def combine(self, y_RD: Tensor, gate_TK: Tensor, plan: RoutingPlan, dispatched: Dispatched) -> Tensor:
        ticket: TokenTicket = dispatched.ticket
        traffic = ticket.traffic
        sums_MD = fan_in(y_RD, self.bring_gates(gate_TK, ticket), ticket.arrivals.fan)
        returned = all_to_all_rows(sums_MD, traffic.tokens_in, traffic.tokens_out, self.group)
        return self.sum_at_home(returned, ticket)

    def bring_gates(self, gate_TK: Tensor, ticket: TokenTicket) -> Tensor:
        """The gate weight of every row here, [R]; differentiable."""
        gate_N1 = gate_TK.reshape(-1, 1).index_select(0, ticket.departures.slot_N)
        traffic = ticket.traffic
        arrived_R1 = all_to_all_rows(gate_N1, traffic.choices_out, traffic.choices_in, self.group)
        return arrived_R1.squeeze(1).index_select(0, ticket.arrivals.order_R)

    def announce(self, plan: RoutingPlan, departures: Departures, tokens: list[int], place_WT: Tensor) -> TokenTicket:
        """Exchanges counts and choices.

        Args:
            plan: The plan.
            departures: Its choices by owner.
            tokens: Tokens that will go to each rank.
            place_WT: Place of a token among those sent to a rank.
        """
        counts_W2 = torch.tensor([tokens, departures.counts], device=place_WT.device).T.reshape(-1)
        two = [2] * len(self.sizes)
        received = exchange_integers(counts_W2, two, two, self.group).tolist()
        traffic = Traffic(dist.get_rank(self.group), tokens, received[0::2], departures.counts, received[1::2])
        code_N = encode_choices(plan, departures, self.sizes, place_WT)
        code_R = exchange_integers(code_N, traffic.choices_out, traffic.choices_in, self.group)
        arrivals = arrange_arrivals(code_R, traffic.tokens_in, traffic.choices_in, self.sizes[traffic.place])
        return TokenTicket(traffic, departures, arrivals)

    def run(self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan, experts: ApplyExperts) -> tuple[Tensor, Journey]:
        dispatched = self.dispatch(x_TD, plan)
        y_RD = experts(dispatched.rows_RD, dispatched.counts_L)
        item = ItemBytes.of(x_TD, y_RD, gate_TK)
        journey = Journey(y_RD.shape[0], self.bytes_sent(dispatched, item).total)
        return self.combine(y_RD, gate_TK, plan, dispatched), journey

    def traffic(self, dispatched: Dispatched) -> Traffic:
        """The counts of one exchange."""
        ticket: TokenTicket = dispatched.ticket
        return ticket.traffic

    def bytes_sent(self, dispatched: Dispatched, item: ItemBytes) -> WireBytes:
        """Bytes that this rank sends to others in the forward pass."""
        return token_bytes(self.traffic(dispatched), item)
