"""A configuration for the number of ranks that there are: degrees that no longer fit give way to the nearest legal."""

from __future__ import annotations

import math
from collections.abc import Callable

from moe_dist.config import Config
from moe_dist.errors import LayoutError
from moe_dist.parallel.layout import Layout, layout_of, legal_layouts


def refitted(config: Config, ranks: int, say: Callable[[str], None] = lambda text: None) -> Config:
    """The configuration as it is where it can take so many ranks, else with the nearest degrees that can.

    Only a run whose number of ranks may change (`launch.workers` with min below max) is refitted; what its numbers are
    does not depend on the layout.

    Raises:
        LayoutError: There is none, or the number of ranks is fixed.
    """
    try:
        layout_of(config, ranks, config.parallel.ranks_per_node)
    except LayoutError:
        if config.launch.workers.min == config.launch.workers.max:
            raise
    else:
        return config
    free = config.model_copy(update={"parallel": config.parallel.model_copy(update={"data_shard": None})})
    layouts = legal_layouts(free, ranks, config.parallel.ranks_per_node)
    if not layouts:
        layout_of(config, ranks, config.parallel.ranks_per_node)  # says why
    best = min(layouts, key=lambda layout: (_distance(config, layout), -layout.expert))
    degrees = {"tensor": best.tensor, "expert": best.expert, "expert_tensor": best.expert_tensor}
    say(f"{ranks} ranks cannot take the degrees asked for: {best}")
    return free.model_copy(update={"parallel": free.parallel.model_copy(update=degrees)})


def _distance(config: Config, layout: Layout) -> float:
    """How far a layout is from the degrees that are asked for, in doublings."""
    asked = config.parallel
    pairs = [(asked.tensor, layout.tensor), (asked.expert_tensor, layout.expert_tensor)]
    pairs += [(asked.expert, layout.expert)] if asked.expert else []
    return sum(abs(math.log2(a / b)) for a, b in pairs)
