"""A layout with its process groups, as seen from one rank: the only creator of process groups."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace

import torch.distributed as dist

from moe_dist.parallel.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """A layout with its process groups, as seen from one rank.

    Attributes:
        layout: The degrees.
        rank: This rank.
        world: Group of all ranks.
        tensor: Group that shares one copy of the dense parameters.
        data: Ranks that hold the same cut of the dense parameters.
        expert: Group that shares one copy of the experts, and exchanges tokens.
        expert_data: Ranks that hold the same cut of the same experts.
        expert_tensor: Group that shares each of its experts.
        node: Ranks of the expert group on this node, where the layout knows nodes.
        rail: Ranks of the expert group with this rank's place in their nodes, where the layout knows nodes.
    """

    layout: Layout
    rank: int
    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    expert_tensor: dist.ProcessGroup
    node: dist.ProcessGroup | None = None
    rail: dist.ProcessGroup | None = None

    @property
    def data_place(self) -> int:
        """Which rows of the batch this rank reads."""
        return self.layout.data_place(self.rank)

    @property
    def tensor_place(self) -> int:
        """Which cut of the dense parameters this rank holds."""
        return self.layout.tensor_place(self.rank)

    @property
    def expert_place(self) -> int:
        """Position of this rank in its expert group."""
        return self.layout.expert_place(self.rank)

    @property
    def expert_copy(self) -> int:
        """Which copy of the experts this rank belongs to."""
        return self.layout.expert_copy(self.rank)

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

    alone: dist.ProcessGroup | None = None

    def of(groups: list[list[int]]) -> dist.ProcessGroup:
        nonlocal alone
        if len(groups) == layout.ranks and alone is not None:
            return alone  # threads and connections for one group of one, not for four
        mine, _ = dist.new_subgroups_by_enumeration(groups, timeout=limit)
        alone = mine if len(groups) == layout.ranks else alone
        return mine

    kinds = {kind: world if kind == "data" and layout.tensor == 1 else of(g) for kind, g in layout.groups().items()}
    mesh = Mesh(layout, dist.get_rank(), world, **kinds)
    if layout.ranks_per_node is None:
        return mesh
    nodes, rails = layout.node_groups()
    return replace(mesh, node=of(nodes), rail=of(rails))
