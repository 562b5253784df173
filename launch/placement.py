"""Which node holds which rank: neighbouring ranks lie on the same node, so that expert groups stay inside nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A living node of the cluster.

    Attributes:
        name: Its id.
        resources: What it has, by resource name.
    """

    name: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Needs:
    """What one rank takes."""

    cpus: float
    gpus: float

    def fit(self, node: Node) -> int:
        """Ranks that a node can hold."""
        count = node.resources.get("CPU", 0.0) / self.cpus
        if self.gpus:
            count = min(count, node.resources.get("GPU", 0.0) / self.gpus)
        return int(count + 1e-9)


def places(nodes: Sequence[Node], needs: Needs, placement: str) -> int:
    """Ranks that the nodes can hold if nothing else runs on them."""
    counts = [needs.fit(node) for node in nodes]
    return sum(count > 0 for count in counts) if placement == "strict_spread" else sum(counts)


def place(nodes: Sequence[Node], needs: Needs, placement: str, ranks: int) -> list[str]:
    """The node of every rank, in order of rank.

    `pack` fills the roomiest nodes first; `spread` gives every node one rank more in turn, and `strict_spread` no more
    than one. Ranks of a node are neighbours in every case.
    """
    room = sorted(((needs.fit(node), node.name) for node in nodes), key=lambda pair: (-pair[0], pair[1]))
    taken = dict.fromkeys((name for fit, name in room if fit), 0)
    left = ranks
    if placement == "pack":
        for fit, name in room:
            if fit:
                taken[name] = min(fit, left)
                left -= taken[name]
    most = 1 if placement == "strict_spread" else max((fit for fit, _ in room), default=0)
    for turn in range(1, most + 1 if placement != "pack" else 0):
        for fit, name in room:
            if left and fit >= turn:
                taken[name] += 1
                left -= 1
    assert left == 0, f"{ranks} ranks asked of nodes that hold {ranks - left}"
    return [name for name, count in taken.items() for _ in range(count)]
