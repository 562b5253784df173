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
        rank: This rank; -1 for a process outside the layout.
        world: Group of all ranks.
        tensor: Group that shares one copy of the dense parameters.
        data: Ranks that hold the same cut of the dense parameters.
        expert: Group that shares one copy of the experts, and exchanges tokens.
        expert_data: Ranks that hold the same cut of the same experts.
        expert_tensor: Group that shares each of its experts.
        data_shard: Ranks that share out one copy of their dense parameters, where the layout does so.
        data_copies: Ranks that keep the same part of different copies, where there are several.
        expert_shard: The same of the experts.
        expert_copies: The same of the experts.
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
    data_shard: dist.ProcessGroup | None = None
    data_copies: dist.ProcessGroup | None = None
    expert_shard: dist.ProcessGroup | None = None
    expert_copies: dist.ProcessGroup | None = None
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


class Groups:
    """The process groups of a world, each made once by all its processes in the same order.

    A group has threads and connections, and what was built on one may outlive its use: those who try many layouts keep
    their groups for the next rather than close them.

    Args:
        timeout_seconds: A collective of any of them that takes longer fails.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.limit = datetime.timedelta(seconds=timeout_seconds)
        self.made: dict[str, dist.ProcessGroup] = {}

    def of(self, kind: str, ranks: list[list[int]]) -> dist.ProcessGroup:
        """This process's one of some groups of the same kind; None at heart for a process that is in none of them."""
        alone = all(len(group) == 1 for group in ranks)  # one group of one will do for all kinds
        key = f"{'alone' if alone else kind} {ranks}"
        if key not in self.made:
            self.made[key], _ = dist.new_subgroups_by_enumeration(ranks, timeout=self.limit)
        return self.made[key]

    def close(self) -> None:
        """Gives them all back."""
        for group in self.made.values():
            if isinstance(group, dist.ProcessGroup):
                dist.destroy_process_group(group)
        self.made.clear()


def build_mesh(layout: Layout, groups: Groups, members: list[int] | None = None) -> Mesh:
    """The groups of a layout; entered by all processes.

    Args:
        layout: The degrees.
        groups: Makes them, or has them.
        members: Processes that are the ranks of the layout, in order; None where all are. The others must enter too,
            and get a mesh that they cannot use (`rank` is -1).
    """
    whole = dist.group.WORLD
    assert whole is not None, "torch.distributed is initialised before the mesh"
    places = list(range(layout.ranks)) if members is None else members
    world = whole if members is None else groups.of("world", [members])
    rank = places.index(dist.get_rank()) if dist.get_rank() in places else -1

    def of(kind: str, ranks: list[list[int]]) -> dist.ProcessGroup:
        return groups.of(kind, [[places[r] for r in group] for group in ranks])

    kinds = {k: world if k == "data" and layout.tensor == 1 else of(k, ranks) for k, ranks in layout.groups().items()}
    if layout.data_shard > 1:
        kinds.setdefault("data_shard", kinds["data"])
    if layout.expert_shard > 1:
        kinds.setdefault("expert_shard", kinds["expert_data"])
    mesh = Mesh(layout, rank, world, **kinds)
    if layout.ranks_per_node is None:
        return mesh
    nodes, rails = layout.node_groups()
    return replace(mesh, node=of("node", nodes), rail=of("rail", rails))
