"""The all-gather dispatcher: every rank sees all tokens of its group and computes its own experts' part of each.

Shape letters: T tokens here, W ranks of the expert group.

What crosses does not depend on the routing: every token goes to every other rank once, and one partial sum comes back.
That is as little as de-duplication can reach when nearly every token has an expert on every rank (a small group, a
large K), whatever the routing; otherwise it sends more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.choices import Departures
from moe_dist.parallel.dispatch_by_token import TokenDispatcher


class AllGatherDispatcher(TokenDispatcher):
    """Gathers all tokens of one expert group on each of its ranks; partial sums return as a reduce-scatter would.

    Ranks may hold unequal numbers of tokens, which `all_gather` of gloo refuses; so each rank sends its tokens to every
    other by an uneven all-to-all.
    """

    def crossings(self, plan: RoutingPlan, departures: Departures) -> Tensor:
        tokens = plan.row_TK.shape[0]
        return torch.ones(len(self.sizes), tokens, dtype=torch.bool, device=plan.slot_N.device)
