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
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from moe_dist.config import Config, ParallelConfig
from moe_dist.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, checked, without any process group.

    Attributes:
        ranks: Processes of the run.
        expert: Ranks that share one copy of the experts.
        num_experts: Routed experts of a layer.
        ranks_per_node: Neighbouring ranks that share a node, where the dispatcher asks for it; divides `expert`.
    """

    ranks: int
    expert: int
    num_experts: int
    ranks_per_node: int | None = None

    @property
    def expert_data(self) -> int:
        """Copies of the experts."""
        return self.ranks // self.expert

    def experts_of(self, place: int) -> range:
        """Global ids of the experts at a place of an expert group; sizes differ by one where X does not divide E."""
        return range(self.num_experts * place // self.expert, self.num_experts * (place + 1) // self.expert)

    def __str__(self) -> str:
        return f"{self.ranks} ranks: data {self.ranks}, expert {self.expert} x expert-data {self.expert_data}"


def ranks_of_node(parallel: ParallelConfig, environment: Mapping[str, str]) -> int | None:
    """Ranks that share a node, of the config or the launcher; None where the dispatcher does not ask.

    Raises:
        LayoutError: Neither says.
    """
    if parallel.dispatch != "two_level" or parallel.ranks_per_node is not None:
        return parallel.ranks_per_node
    launched = environment.get("LOCAL_WORLD_SIZE", "")
    if not launched.isdecimal() or int(launched) < 1:
        rule = (
            f"two_level asks how many ranks share a node; LOCAL_WORLD_SIZE of the launcher is {launched or 'not set'}"
        )
        raise LayoutError("parallel.ranks_per_node", None, rule, "parallel.ranks_per_node=1 or more")
    return int(launched)


def choose_layout(asked_expert: int | None, ranks: int, num_experts: int, ranks_per_node: int | None = None) -> Layout:
    """Checks an expert degree, or chooses the largest divisor of the ranks that is not above the experts.

    Raises:
        LayoutError: The degree does not divide the ranks or is above the number of experts, or nodes would divide
            an expert group unequally.
    """
    legal = [n for n in range(1, ranks + 1) if ranks % n == 0 and n <= num_experts]
    expert = legal[-1] if asked_expert is None else asked_expert
    if expert not in legal:
        rule = f"must divide the {ranks} ranks and not exceed model.moe.num_experts ({num_experts})"
        fix = f"parallel.expert={_nearest(legal, expert)} (legal here: {', '.join(map(str, legal))})"
        raise LayoutError("parallel.expert", expert, rule, fix)
    if ranks_per_node is not None and expert % ranks_per_node:
        rule = f"must divide the {expert} ranks that share one copy of the experts, so that nodes cut them equally"
        divisors = [n for n in range(1, expert + 1) if expert % n == 0]
        fix = f"parallel.ranks_per_node={_nearest(divisors, ranks_per_node)}"
        raise LayoutError("parallel.ranks_per_node", ranks_per_node, rule, fix)
    return Layout(ranks, expert, num_experts, ranks_per_node)


def layout_of(config: Config, ranks: int, ranks_per_node: int | None) -> Layout:
    """The layout that a config asks for on so many ranks.

    Raises:
        LayoutError: There is none.
    """
    return choose_layout(config.parallel.expert, ranks, config.model.moe.num_experts, ranks_per_node)


def _nearest(legal: list[int], asked: int) -> int:
    return min(legal, key=lambda n: abs(n - asked))


@dataclass(frozen=True)
class Mesh:
    """A layout with its process groups, as seen from one rank.

    Attributes:
        layout: The degrees.
        rank: This rank.
        world: Group of all ranks: data parallelism of the dense parameters.
        expert: Group that shares one copy of the experts.
        expert_data: Group of ranks that hold the same experts.
        node: Ranks of the expert group on this node, where the layout knows nodes.
        rail: Ranks of the expert group with this rank's place in their nodes, where the layout knows nodes.
    """

    layout: Layout
    rank: int
    world: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    node: dist.ProcessGroup | None = None
    rail: dist.ProcessGroup | None = None

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
    if layout.ranks_per_node is None:
        return Mesh(layout, dist.get_rank(), world, expert, expert_data)
    nodes, rails = node_groups(layout)
    node, _ = dist.new_subgroups_by_enumeration(nodes, timeout=limit)
    rail, _ = dist.new_subgroups_by_enumeration(rails, timeout=limit)
    return Mesh(layout, dist.get_rank(), world, expert, expert_data, node, rail)


def node_groups(layout: Layout) -> tuple[list[list[int]], list[list[int]]]:
    """The ranks of every node, and those of the same place in the nodes of one expert group.

    Example, 8 ranks in expert groups of 4 and nodes of 2: nodes 01 23 45 67, rails 02 13 46 57.
    """
    size = layout.ranks_per_node
    assert size is not None, "only a layout that knows nodes has groups of them"
    copies = range(0, layout.ranks, layout.expert)
    nodes = [list(range(first, first + size)) for first in range(0, layout.ranks, size)]
    rails = [list(range(copy + place, copy + layout.expert, size)) for copy in copies for place in range(size)]
    return nodes, rails
