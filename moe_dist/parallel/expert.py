"""Expert parallelism: cutting the experts of a model to the ranks and swapping the chosen dispatcher in."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.model.transformer import Transformer
from moe_dist.moe.dispatch import Dispatcher
from moe_dist.moe.experts import Experts
from moe_dist.parallel.collectives import sum_ranks
from moe_dist.parallel.dispatch_all_gather import AllGatherDispatcher
from moe_dist.parallel.dispatch_all_to_all import AllToAllDispatcher
from moe_dist.parallel.dispatch_deduplicated import DeduplicatedDispatcher
from moe_dist.parallel.mesh import Mesh


def shard_experts(model: Transformer, mesh: Mesh, dispatch: str = "all_to_all") -> None:
    """Leaves each layer the experts of this rank and swaps the dispatcher named `dispatch` in.

    The model is on `meta`; weights are filled afterwards by global name.
    """
    owners = [mesh.layout.experts_of(place) for place in range(mesh.layout.expert)]
    for _, layer in model.moe_layers():
        with torch.device("meta"):
            layer.experts = Experts(model.config.width, layer.config, mesh.experts_here)
        layer.dispatcher = build_dispatcher(dispatch, mesh.expert, owners)


def build_dispatcher(kind: str, group: dist.ProcessGroup, experts_by_rank: list[range]) -> Dispatcher:
    """The dispatcher that `parallel.dispatch` names, over one expert group whose ranks own neighbouring experts."""
    match kind:
        case "all_to_all":
            return AllToAllDispatcher(group, experts_by_rank)
        case "all_gather":
            return AllGatherDispatcher(group, experts_by_rank)
        case "deduplicated":
            return DeduplicatedDispatcher(group, experts_by_rank)
    raise AssertionError(f"parallel.dispatch={kind} passed the config but has no dispatcher")


def share_counts(model: Transformer, mesh: Mesh) -> None:
    """Lets the global balance term see the counts of all ranks."""

    def over_all_ranks(counts: Tensor) -> Tensor:
        return sum_ranks(counts.clone(), mesh.world)

    for _, layer in model.moe_layers():
        layer.sum_over_ranks = over_all_ranks
