"""What a checkpoint holds: every weight and both AdamW moments, and every buffer, under global names.

model/embedding.weight                           exp_avg/embedding.weight          exp_avg_sq/...
model/blocks.0.feed_forward.experts.down#5       one tensor an expert, by global expert id
model/blocks.0.feed_forward.router.selection_bias                                     a buffer has no moments
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.model.naming import GlobalTensor, global_buffers, global_tensors, pieces_by_parameter
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.fsdp import whole
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.tensor import gather_cut
from moe_dist.parallel.zero import ShardedOptimizer, state_holders

MOMENTS = ("exp_avg", "exp_avg_sq")


def expected_names(config: ModelConfig) -> set[str]:
    """Every name that a complete checkpoint of this model has."""
    with torch.device("meta"):
        model = Transformer(config)
    kinds = ("model", *MOMENTS)
    pieces = {f"{kind}/{piece.name}" for piece in global_tensors(model) for kind in kinds}
    return pieces | set(buffers_here(model))


def parameters_here(
    model: Transformer, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[list[GlobalTensor], dict[str, Tensor]]]:
    """Every parameter held by this rank: its pieces, its weight and, where their state is here, its moments by kind."""
    state = {parameter: held for holder in state_holders(optimizer) for parameter, held in holder.state.items()}
    for path, pieces in pieces_by_parameter(model):
        parameter = model.get_parameter(path)
        tensors = {"model": parameter.detach()}
        if parameter in state:
            tensors |= {moment: state[parameter][moment] for moment in MOMENTS}
        yield pieces, tensors


def pieces_here(
    model: Transformer, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[GlobalTensor, dict[str, Tensor]]]:
    """Every piece held by this rank with its tensors by kind; entered by all ranks that share out parameters."""
    for pieces, tensors in parameters_here(model, optimizer):
        held = {kind: whole(tensor) for kind, tensor in tensors.items()}
        for piece in pieces:
            yield piece, {kind: piece.of(tensor) for kind, tensor in held.items()}


def buffers_here(model: Transformer) -> dict[str, Tensor]:
    """Every buffer by its name in a checkpoint; every rank holds all of them."""
    return {f"model/{name}": buffer for name, buffer in global_buffers(model).items()}


def owned_tensors(model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh) -> dict[str, Tensor]:
    """The named tensors that this rank writes, whole: each exists on several ranks and is written by one of them.

    Entered by all ranks: those that hold cuts of a tensor put it together, one tensor at a time. Where the optimizer's
    state is shared out, the one rank that holds a parameter's moments writes its weight too; of those that hold cuts
    of them, the first.
    """
    sharded = isinstance(optimizer, ShardedOptimizer)
    owned = buffers_here(model) if mesh.rank == 0 else {}
    dense = 0  # counted over dense pieces alone: ranks hold different numbers of experts
    for piece, tensors in pieces_here(model, optimizer):
        first = piece.cut is None or piece.cut.place == 0
        if sharded:
            mine = len(tensors) > 1 and first
        elif piece.index is None:
            mine = dense % mesh.layout.ranks == mesh.rank
            dense += 1
        else:
            mine = piece.index % mesh.layout.expert_data == mesh.expert_copy and first
        joined = {f"{kind}/{piece.name}": gather_cut(piece, tensor, mesh) for kind, tensor in tensors.items()}
        if mine:
            # Views of what was put together for this save alone would keep all of it.
            owned |= {name: tensor.clone() if mesh.layout.shards else tensor for name, tensor in joined.items()}
    return owned


def prepare_moments(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Gives every parameter whose state is here zero moments and its number of updates, ready to be filled."""
    for holder in state_holders(optimizer):
        for group in holder.param_groups:
            for parameter in group["params"]:
                step = torch.tensor(float(updates), dtype=torch.float32, device=parameter.device)
                moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
                holder.state[parameter] = {"step": step, **moments}
