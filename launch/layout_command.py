"""`moe-dist layout`: which rank holds and does what, before any process is started.

JSON: {"layout", "ranks": [{"rank", "node", "data", "tensor", "expert_copy", "experts", "expert_tensor"}],
"groups": {kind: [[rank, ...], ...]}, "spans_nodes": {kind: bool}, "legal": ["..."]}.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.config import Config
from moe_dist.errors import LayoutError
from moe_dist.parallel.layout import Layout, layout_of, legal_layouts


def describe(config: Config, ranks: int, nodes: int | None) -> dict[str, Any]:
    """The layout that a config asks for on so many ranks, as plain values.

    Raises:
        LayoutError: It cannot work; the nearest that can are named.
    """
    if nodes is not None and ranks % nodes:
        fix = min((n for n in range(1, ranks + 1) if ranks % n == 0), key=lambda n: abs(n - nodes))
        raise LayoutError("--nodes", nodes, f"must divide the {ranks} ranks", f"--nodes {fix}")
    of_node = None if nodes is None else ranks // nodes
    two_level = config.parallel.dispatch == "two_level"
    layout = layout_of(config, ranks, config.parallel.ranks_per_node or (of_node if two_level else None))
    node_of = [rank // (of_node or ranks) for rank in range(ranks)]
    groups = layout.groups()
    spans = {kind: any(len({node_of[r] for r in group}) > 1 for group in found) for kind, found in groups.items()}
    legal = [str(other) for other in legal_layouts(config, ranks, layout.ranks_per_node)]
    rows = [_row(layout, rank, node_of[rank]) for rank in range(ranks)]
    return {"layout": str(layout), "ranks": rows, "groups": groups, "spans_nodes": spans, "legal": legal}


def _row(layout: Layout, rank: int, node: int) -> dict[str, Any]:
    experts = layout.experts_of(layout.expert_place(rank))
    return {
        "rank": rank,
        "node": node,
        "data": layout.data_place(rank),
        "tensor": layout.tensor_place(rank),
        "expert_copy": layout.expert_copy(rank),
        "experts": [experts.start, experts.stop - 1],
        "expert_tensor": layout.expert_tensor_place(rank),
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The map of ranks, the groups, and how many other layouts there are."""
    ranks = Table(
        "rank", "node", "reads rows", "tensor cut", "expert copy", "experts", "expert cut", title=found["layout"]
    )
    for row in found["ranks"]:
        first, last = row["experts"]
        places = [row[key] for key in ("rank", "node", "data", "tensor", "expert_copy")]
        ranks.add_row(*map(str, places), f"{first} to {last}", str(row["expert_tensor"]))
    groups = Table("group", "between nodes", "ranks", title="who talks to whom")
    for kind, members in found["groups"].items():
        shown = "  ".join(" ".join(map(str, group)) for group in members[:8]) + ("  ..." if members[8:] else "")
        groups.add_row(kind.replace("_", "-"), "yes" if found["spans_nodes"][kind] else "no", shown)
    console.print(ranks, groups, f"{len(found['legal'])} layouts of {len(found['ranks'])} ranks are legal")
