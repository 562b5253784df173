"""The two views of the same ranks: all of them share the data; groups of them share one copy of the experts.

With W ranks and expert degree X, rank r = copy * X + place: ranks of one copy are neighbours, so that an expert group
stays inside a node where it can.

    W = 4, X = 2        expert place 0     expert place 1
    expert copy 0            rank 0             rank 1       <- exchange tokens with each other
    expert copy 1            rank 2             rank 3
                        ^ sum expert gradients down each column
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch.distributed as dist

from moe_dist.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, checked, without any process group.

    Attributes:
        ranks: Processes of the run.
        expert: Ranks that share one copy of the experts.
        num_experts: Routed experts of a layer.
    """

    ranks: int
    expert: int
    num_experts: int

    @property
    def expert_data(self) -> int:
        """Copies of the experts."""
        return self.ranks // self.expert

    def experts_of(self, place: int) -> range:
        """Global ids of the experts at a place of an expert group; sizes differ by one where X does not divide E."""
        return range(self.num_experts * place // self.expert, self.num_experts * (place + 1) // self.expert)

    def __str__(self) -> str:
        return f"{self.ranks} ranks: data {self.ranks}, expert {self.expert} x expert-data {self.expert_data}"


def choose_layout(asked_expert: int | None, ranks: int, num_experts: int) -> Layout:
    """Checks an expert degree, or chooses the largest divisor of the ranks that is not above the experts.

    Raises:
        LayoutError: The degree does not divide the ranks or is above the number of experts.
    """
    legal = [n for n in range(1, ranks + 1) if ranks % n == 0 and n <= num_experts]
    if asked_expert is None:
        return Layout(ranks, legal[-1], num_experts)
    if asked_expert not in legal:
        rule = f"must divide the {ranks} ranks and not exceed model.moe.num_experts ({num_experts})"
        nearest = min(legal, key=lambda n: abs(n - asked_expert))
        fix = f"parallel.expert={nearest} (legal here: {', '.join(map(str, legal))})"
        raise LayoutError("parallel.expert", asked_expert, rule, fix)
    return Layout(ranks, asked_expert, num_experts)


@dataclass(frozen=True)
class Mesh:
    """A layout with its process groups, as seen from one rank.

    Attributes:
        layout: The degrees.
        rank: This rank.
        world: Group of all ranks: data parallelism of the dense parameters.
        expert: Group that shares one copy of the experts.
        expert_data: Group of ranks that hold the same experts.
    """

    layout: Layout
    rank: int
    world: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup

    @property
    def expert_place(self) -> int:
        """Position of this rank in its expert group."""
        return self.rank % self.layout.expert

    @property
    def expert_copy(self) -> int:
        """Which copy of the experts this rank belongs to."""
        return self.rank // self.layout.expert

    @property
    def experts_here(self) -> range:
        """Global ids of the experts this rank holds."""
        return self.layout.experts_of(self.expert_place)


def build_mesh(layout: Layout, timeout_seconds: float) -> Mesh:
    """Creates the groups; entered by all ranks, and every group by all of them in the same order.

    Args:
        layout: The degrees.
        timeout_seconds: A collective of any of the groups that takes longer fails.
    """
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is initialised before the mesh"
    limit = datetime.timedelta(seconds=timeout_seconds)
    places, copies = range(layout.expert), range(layout.expert_data)
    one_copy = [[copy * layout.expert + place for place in places] for copy in copies]
    same_experts = [[copy * layout.expert + place for copy in copies] for place in places]
    expert, _ = dist.new_subgroups_by_enumeration(one_copy, timeout=limit)
    expert_data, _ = dist.new_subgroups_by_enumeration(same_experts, timeout=limit)
    return Mesh(layout, dist.get_rank(), world, expert, expert_data)
