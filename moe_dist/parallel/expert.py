"""Expert parallelism: cutting the experts of a model to the ranks and swapping the chosen dispatcher in."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.config import ModelConfig, MoEConfig, ParallelConfig
from moe_dist.model.transformer import Transformer
from moe_dist.moe.dispatch import Dispatcher
from moe_dist.moe.experts import Experts
from moe_dist.parallel.collectives import sum_ranks
from moe_dist.parallel.dispatch_all_gather import AllGatherDispatcher
from moe_dist.parallel.dispatch_all_to_all import AllToAllDispatcher
from moe_dist.parallel.dispatch_deduplicated import DeduplicatedDispatcher
from moe_dist.parallel.dispatch_deepep import DeepEPDispatcher, open_buffer
from moe_dist.parallel.dispatch_overlapped import OverlappedDispatcher
from moe_dist.parallel.dispatch_two_level import TwoLevelDispatcher
from moe_dist.parallel.expert_tensor import CutExperts
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.phases import PhasedDispatcher


def shard_experts(model: Transformer, mesh: Mesh, parallel: ParallelConfig) -> None:
    """Leaves each layer the experts of this rank and swaps the dispatcher in; entered by all ranks.

    The model is on `meta`; weights are filled afterwards by global name. Layers share one dispatcher, which holds
    nothing of a step. Where all experts are here, none is needed.
    """
    exchanges = mesh.layout.expert > 1
    dispatcher = build_dispatcher(mesh, parallel, model.config) if exchanges else None
    for _, layer in model.moe_layers():
        with torch.device("meta"):
            layer.experts = _experts_here(model.config.width, layer.config, mesh)
        if dispatcher is not None:
            layer.dispatcher = dispatcher


def _experts_here(width: int, config: MoEConfig, mesh: Mesh) -> Experts:
    if mesh.layout.expert_tensor > 1:
        return CutExperts(width, config, mesh)
    return Experts(width, config, mesh.experts_here)


def build_dispatcher(mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> Dispatcher:
    """The dispatcher that a config names, over this rank's expert group, whose ranks own neighbouring experts.

    Raises:
        LayoutError: The dispatcher cannot be had here.
    """
    owners = [mesh.layout.experts_of(place) for place in range(mesh.layout.expert)]
    weigh_input = model.moe.weigh == "input"
    if parallel.dispatch == "deepep":
        width = model.moe.latent_width or model.width
        return DeepEPDispatcher(open_buffer(mesh.expert, owners, width), weigh_input)
    phases = _phases(mesh, parallel.dispatch, owners, weigh_input)
    return phases if parallel.overlap_chunks == 1 else OverlappedDispatcher(phases, parallel.overlap_chunks)


def _phases(mesh: Mesh, dispatch: str, owners: list[range], weigh_input: bool) -> PhasedDispatcher:
    match dispatch:
        case "all_to_all":
            return AllToAllDispatcher(mesh.expert, owners, weigh_input)
        case "all_gather":
            return AllGatherDispatcher(mesh.expert, owners, weigh_input)
        case "deduplicated":
            return DeduplicatedDispatcher(mesh.expert, owners, weigh_input)
        case "two_level":
            assert mesh.rail is not None and mesh.node is not None, "a two-level layout has groups of nodes"
            return TwoLevelDispatcher(mesh.rail, mesh.node, owners, weigh_input)
    raise AssertionError(f"parallel.dispatch={dispatch} passed the config but has no dispatcher")


def share_counts(model: Transformer, mesh: Mesh) -> None:
    """Lets the global balance term see the counts of all ranks."""

    def over_all_ranks(counts: Tensor) -> Tensor:
        return sum_ranks(counts.clone(), mesh.world)

    for _, layer in model.moe_layers():
        layer.sum_over_ranks = over_all_ranks
