"""The de-duplicated all-to-all: a token crosses to a rank once, however many of its experts live there.

Shape letters: T tokens here, W ranks of the expert group.

    token t, K = 4, experts 0 1 on rank 0, 2 3 on rank 1          plain sends 4 rows, this sends 2

        x_t --> rank 0 --> g0*e0(x_t) + g1*e1(x_t) --+
        x_t --> rank 1 --> g2*e2(x_t) + g3*e3(x_t) --+--> out_t

Source: DeepSeek-V3 (2024), section 3.2.2, sends a token once to each node; here it is once to each rank.
"""

from __future__ import annotations

from torch import Tensor

from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.choices import Departures, crossing_tokens
from moe_dist.parallel.dispatch_by_token import TokenDispatcher


class DeduplicatedDispatcher(TokenDispatcher):
    """Brings every token to each rank that holds one of its kept experts, once, over one expert group."""

    def crossings(self, plan: RoutingPlan, departures: Departures) -> Tensor:
        return crossing_tokens(plan, departures.owner_N, len(self.sizes))
