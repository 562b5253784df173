"""The de-duplicated all-to-all: a token crosses to a rank once, however many of its experts live there.

Shape letters: T tokens here, D model width, W ranks of the expert group, C crossings (pairs of a token and a rank that
holds one of its kept experts), M tokens received.

    token t, K = 4, experts 0 1 on rank 0, 2 3 on rank 1          plain sends 4 rows, this sends 2

        x_t --> rank 0 --> g0*e0(x_t) + g1*e1(x_t) --+
        x_t --> rank 1 --> g2*e2(x_t) + g3*e3(x_t) --+--> out_t

Source: DeepSeek-V3 (2024), section 3.2.2, sends a token once to each node; here it is once to each rank.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.choices import crossing_tokens, list_departures
from moe_dist.parallel.collectives import all_to_all_rows
from moe_dist.parallel.dispatch_by_token import TokenDispatcher, TokenTicket
from moe_dist.parallel.fan import Fan, fan_in, fan_out


class DeduplicatedDispatcher(TokenDispatcher):
    """Brings every token to each rank that holds one of its kept experts, once, over one expert group."""

    def send(self, x_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, TokenTicket]:
        departures = list_departures(plan, self.sizes)
        crosses_WT = crossing_tokens(plan, departures.owner_N, len(self.sizes))
        tokens = crosses_WT.sum(1).tolist()
        ticket = self.announce(plan, departures, tokens, crosses_WT.cumsum(1) - 1)
        home = fan_of_crossings(crosses_WT)
        tokens_MD = all_to_all_rows(fan_out(x_TD, home), tokens, ticket.traffic.tokens_in, self.group)
        return tokens_MD, replace(ticket, home=home)

    def sum_at_home(self, returned: Tensor, ticket: TokenTicket) -> Tensor:
        assert ticket.home is not None, "send() keeps the way home"
        return fan_in(returned, None, ticket.home)


def fan_of_crossings(crosses_WT: Tensor) -> Fan:
    """From tokens to crossings ordered by rank, then token; a token's crossings are summed in order of rank."""
    crossing_WT = crosses_WT.reshape(-1).cumsum(0).view_as(crosses_WT) - 1
    return Fan.of(crosses_WT.sum(0), crossing_WT.T[crosses_WT.T])
