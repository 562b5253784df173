"""The phases of a dispatcher over several ranks, cut where something is under way.

    announce   who sends how much to whom; integers only, a function of the plan                     waits
    launch     starts sending tokens (and gate weights, where they travel)
    arrive     waits for them and lays them out as rows sorted by expert
               experts
    send_back  lays results out by destination and starts sending them
    collect    waits for them and sums them where the tokens live

Between `launch` and `arrive`, and between `send_back` and `collect`, a rank may compute something else: the overlapped
dispatcher does, `run` does not.

Shape letters: T tokens here, D model width, K experts per token, R rows at the experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe_dist.moe.dispatch import ApplyExperts, Journey
from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.collectives import Underway
from moe_dist.parallel.wire import ItemBytes, TwoLevelBytes, WireBytes


@dataclass(frozen=True)
class Dispatched:
    """Rows at their experts, and what is needed to bring the results back.

    Attributes:
        rows_RD: Inputs of the experts, sorted by expert.
        counts_L: Rows of each expert here, on the host.
        ticket: The dispatcher's own record of the way back.
    """

    rows_RD: Tensor
    counts_L: list[int]
    ticket: Any = None


@dataclass(frozen=True)
class Flight:
    """Rows under way, to the experts or back.

    Attributes:
        ticket: What `announce` found.
        rows: The rows.
        gates: The gate weights: at home, or under way beside the rows.
    """

    ticket: Any
    rows: Underway
    gates: Any = None


class PhasedDispatcher(ABC):
    """A dispatcher whose exchanges can be left under way. Every phase is entered by all ranks in the same order."""

    @abstractmethod
    def announce(self, plan: RoutingPlan) -> Any:
        """Exchanges the counts of a plan; returns the ticket of all later phases."""

    @abstractmethod
    def launch(self, x_TD: Tensor, gate_TK: Tensor, ticket: Any) -> Flight:
        """Starts sending to the experts."""

    @abstractmethod
    def arrive(self, flight: Flight) -> Dispatched:
        """Waits for the rows of this rank's experts; `Dispatched.ticket` is what `send_back` needs."""

    @abstractmethod
    def send_back(self, y_RD: Tensor, dispatched: Dispatched) -> Flight:
        """Starts sending results home."""

    @abstractmethod
    def collect(self, flight: Flight) -> Tensor:
        """Waits for the results; [T, D]."""

    @abstractmethod
    def bytes_sent(self, ticket: Any, item: ItemBytes) -> WireBytes | TwoLevelBytes:
        """Bytes that this rank sends to others in the forward pass, a closed formula of the announced counts."""

    def run(self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan, experts: ApplyExperts) -> tuple[Tensor, Journey]:
        ticket = self.announce(plan)
        dispatched = self.arrive(self.launch(x_TD, gate_TK, ticket))
        y_RD = experts(dispatched.rows_RD, dispatched.counts_L)
        sent = self.bytes_sent(ticket, ItemBytes.of(x_TD, y_RD, gate_TK))
        return self.collect(self.send_back(y_RD, dispatched)), Journey(y_RD.shape[0], sent.total)


class GroupDispatcher(PhasedDispatcher, ABC):
    """One that exchanges over a single group.

    Args:
        group: Ranks that own neighbouring experts.
        experts_by_rank: Those of each.
        weigh_input: Gate weights multiply what experts receive, not what they return.
    """

    def __init__(self, group: dist.ProcessGroup, experts_by_rank: list[range], weigh_input: bool = False) -> None:
        self.group, self.weigh_input = group, weigh_input
        self.sizes = [len(experts) for experts in experts_by_rank]
