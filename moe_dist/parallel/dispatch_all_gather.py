"""The all-gather dispatcher: every rank sees all tokens of its group and computes its own experts' part of each.

Shape letters: T tokens here, D model width, W ranks of the expert group, M tokens of the whole group.

What crosses does not depend on the routing: every token goes to every other rank once, and one partial sum comes back.
That is as little as de-duplication can reach when nearly every token has an expert on every rank (a small group, a
large K), with less bookkeeping; otherwise it sends more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.choices import list_departures
from moe_dist.parallel.collectives import all_gather_rows, sum_by_rank
from moe_dist.parallel.dispatch_by_token import TokenDispatcher, TokenTicket


class AllGatherDispatcher(TokenDispatcher):
    """Gathers all tokens of one expert group on each of its ranks; partial sums return as a reduce-scatter would."""

    def send(self, x_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, TokenTicket]:
        tokens, ranks = x_TD.shape[0], len(self.sizes)
        place_WT = torch.arange(tokens, device=x_TD.device).expand(ranks, tokens)
        ticket = self.announce(plan, list_departures(plan, self.sizes), [tokens] * ranks, place_WT)
        return all_gather_rows(x_TD, ticket.traffic.tokens_in, self.group), ticket

    def sum_at_home(self, returned: Tensor, ticket: TokenTicket) -> Tensor:
        return sum_by_rank(returned, len(self.sizes))
