"""The overlapped dispatcher: tokens are cut into parts, of which one is exchanged while another is computed.

Shape letters: T tokens here, D model width, K experts per token, N rows of a plan, P those of a part.

    three parts, forward        launch 0, launch 1, arrive 0, EXPERTS 0, send back 0,
                                          launch 2, arrive 1, EXPERTS 1, send back 1,
                                                    arrive 2, EXPERTS 2, send back 2,   collect 0, 1, 2

While the experts compute part 1, part 2 is on its way to them and part 0 on its way home. The backward pass is the same
read from right to left, with every start and wait exchanged (`collectives.start_rows` says why).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moe_dist.moe.dispatch import ApplyExperts, Journey
from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.phases import PhasedDispatcher
from moe_dist.parallel.wire import ItemBytes


@dataclass(frozen=True)
class OverlappedDispatcher:
    """Runs the phases of another dispatcher on parts of the tokens.

    Attributes:
        phases: The dispatcher of every part.
        chunks: Parts; equally many on every rank, so that all enter the same exchanges. Some may be empty.
    """

    phases: PhasedDispatcher
    chunks: int

    def run(self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan, experts: ApplyExperts) -> tuple[Tensor, Journey]:
        phases, cuts = self.phases, [x_TD.shape[0] * c // self.chunks for c in range(self.chunks + 1)]
        spans = list(pairwise(cuts))
        # All counts go before the first row, which would hold them up.
        tickets = [phases.announce(plan.part(*span)) for span in spans]
        sizes = [last - first for first, last in spans]
        parts = list(zip(x_TD.split(sizes), gate_TK.split(sizes), tickets, strict=True))
        outbound, homebound, rows, sent = phases.launch(*parts[0]), [], 0, 0
        for number, ticket in enumerate(tickets):
            arriving = outbound
            if number + 1 < self.chunks:
                outbound = phases.launch(*parts[number + 1])
            dispatched = phases.arrive(arriving)
            y_RD = experts(dispatched.rows_RD, dispatched.counts_L)
            homebound.append(phases.send_back(y_RD, dispatched))
            rows += y_RD.shape[0]
            sent += phases.bytes_sent(ticket, ItemBytes.of(x_TD, y_RD, gate_TK)).total
        return torch.cat([phases.collect(flight) for flight in homebound]), Journey(rows, sent)
