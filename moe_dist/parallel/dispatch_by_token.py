"""What the all-gather and the de-duplicated dispatcher share: tokens travel, not rows.

Shape letters: T tokens here, D model width, K experts per token, N kept choices here, W ranks of the expert group,
L experts here, M tokens received, R rows at the experts.

On every rank at once:

    announce   two counts for every rank: tokens and choices                                    int64 [W, 2]
               the choices themselves, one integer each                                         int64 [N]
    launch     a token for every rank it goes to, a gate weight for every choice                [., D], [N]
    arrive     each received token fans out to a row for each of its experts here               [M, D] -> [R, D]
               experts
    send_back  rows times gate weights fan in to one sum for each received token; it goes home  [R, D] -> [M, D]
    collect    sums over the ranks a token went to, in their order                              [., D] -> [T, D]

The gate's gradient is computed where the expert's output lives (its input, where gates multiply that) and travels home
as the gate came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.moe.dispatch import weigh_rows
from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.choices import Arrivals, Departures, arrange_arrivals, encode_choices, list_departures
from moe_dist.parallel.collectives import arrived_rows, exchange_integers, start_rows
from moe_dist.parallel.fan import Fan, fan_in, fan_of_crossings, fan_out
from moe_dist.parallel.phases import Dispatched, Flight, GroupDispatcher
from moe_dist.parallel.wire import ItemBytes, Traffic, WireBytes, token_bytes


@dataclass(frozen=True)
class TokenTicket:
    """The way there and back of one exchange.

    Attributes:
        traffic: Tokens and choices to and from each rank of the group.
        departures: This rank's choices, by owner.
        home: From tokens to their crossings, ordered by rank, then token.
        arrivals: The rows here.
    """

    traffic: Traffic
    departures: Departures
    home: Fan
    arrivals: Arrivals


class TokenDispatcher(GroupDispatcher, ABC):
    """Brings tokens with their choices and gates to ranks, and one sum per token and rank home."""

    @abstractmethod
    def crossings(self, plan: RoutingPlan, departures: Departures) -> Tensor:
        """Whether a token goes to a rank, bool [W, T]; it does where it has a kept choice there."""

    def announce(self, plan: RoutingPlan) -> TokenTicket:
        departures = list_departures(plan, self.sizes)
        crosses_WT = self.crossings(plan, departures)
        tokens = crosses_WT.sum(1).tolist()
        counts_W2 = torch.tensor([tokens, departures.counts], device=crosses_WT.device).T.reshape(-1)
        two = [2] * len(self.sizes)
        received = exchange_integers(counts_W2, two, two, self.group).tolist()
        traffic = Traffic(dist.get_rank(self.group), tokens, received[0::2], departures.counts, received[1::2])
        code_N = encode_choices(plan, departures, self.sizes, crosses_WT.cumsum(1) - 1)
        code_R = exchange_integers(code_N, traffic.choices_out, traffic.choices_in, self.group)
        arrivals = arrange_arrivals(code_R, traffic.tokens_in, traffic.choices_in, self.sizes[traffic.place])
        return TokenTicket(traffic, departures, fan_of_crossings(crosses_WT), arrivals)

    def launch(self, x_TD: Tensor, gate_TK: Tensor, ticket: TokenTicket) -> Flight:
        traffic = ticket.traffic
        gate_N = gate_TK.reshape(-1).index_select(0, ticket.departures.slot_N)
        gates = start_rows(gate_N, traffic.choices_out, traffic.choices_in, self.group)
        tokens = start_rows(fan_out(x_TD, ticket.home), traffic.tokens_out, traffic.tokens_in, self.group)
        return Flight(ticket, tokens, gates)

    def arrive(self, flight: Flight) -> Dispatched:
        ticket: TokenTicket = flight.ticket
        gate_R, tokens_MD = self.gates_of_rows(flight), arrived_rows(flight.rows)
        rows_RD = fan_out(tokens_MD, ticket.arrivals.fan)
        if self.weigh_input:
            return Dispatched(weigh_rows(rows_RD, gate_R), ticket.arrivals.counts_L, (ticket, None))
        return Dispatched(rows_RD, ticket.arrivals.counts_L, (ticket, gate_R))

    def gates_of_rows(self, flight: Flight) -> Tensor:
        """The gate weight of every row here, [R]."""
        return arrived_rows(flight.gates).index_select(0, flight.ticket.arrivals.order_R)

    def send_back(self, y_RD: Tensor, dispatched: Dispatched) -> Flight:
        ticket, gate_R = dispatched.ticket
        return self.send_sums(fan_in(y_RD, gate_R, ticket.arrivals.fan), ticket)

    def send_sums(self, sums_MD: Tensor, ticket: TokenTicket) -> Flight:
        """Starts sending the sum of each received token home."""
        traffic = ticket.traffic
        return Flight(ticket, start_rows(sums_MD, traffic.tokens_in, traffic.tokens_out, self.group))

    def collect(self, flight: Flight) -> Tensor:
        return fan_in(arrived_rows(flight.rows), None, flight.ticket.home)

    def bytes_sent(self, ticket: TokenTicket, item: ItemBytes) -> WireBytes:
        return token_bytes(ticket.traffic, item)
