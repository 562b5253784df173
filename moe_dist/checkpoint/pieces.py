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


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every name that a complete checkpoint of this model has, with the whole tensor's shape."""
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {f"model/{name}": buffer.shape for name, buffer in global_buffers(model).items()}
    for piece in global_tensors(model):
        shape = piece.of(model.get_parameter(piece.parameter)).shape
        shapes |= {f"{kind}/{piece.name}": shape for kind in ("model", *MOMENTS)}
    return shapes


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


def owned_shapes(
    model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor that `owned_tensors` will give."""
    owned = {name: (buffer.shape, buffer.dtype) for name, buffer in _owned_buffers(model, mesh).items()}
    for pieces, tensors in _shared_out(model, optimizer, mesh):
        for piece, mine in pieces:
            for kind, tensor in tensors.items() if mine else ():
                held = tensor.shape if piece.index is None else tensor.shape[1:]
                whole_shape = held if piece.cut is None else piece.cut.whole_shape(held)
                owned[f"{kind}/{piece.name}"] = (whole_shape, tensor.dtype)
    return owned


def owned_tensors(model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """The named tensors that this rank writes, whole: each exists on several ranks and is written by one of them.

    Entered by all ranks to its end: those that hold cuts of a tensor put it together, one parameter at a time, which is
    the most that a rank holds besides its own. Where the optimizer's state is shared out, the one rank that holds a
    parameter's moments writes its weight too; of those that hold cuts of them, the first.
    """
    yield from _owned_buffers(model, mesh).items()
    for pieces, tensors in _shared_out(model, optimizer, mesh):
        held = {kind: whole(tensor) for kind, tensor in tensors.items()}
        for piece, mine in pieces:
            for kind, tensor in held.items():
                joined = gather_cut(piece, piece.of(tensor), mesh)
                if mine:
                    yield f"{kind}/{piece.name}", joined


def _owned_buffers(model: Transformer, mesh: Mesh) -> dict[str, Tensor]:
    return buffers_here(model) if mesh.rank == 0 else {}


def _shared_out(
    model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh
) -> Iterator[tuple[list[tuple[GlobalTensor, bool]], dict[str, Tensor]]]:
    """Every parameter held here with its tensors by kind, its pieces, and whether this rank writes each of them."""
    sharded = isinstance(optimizer, ShardedOptimizer)
    dense = 0  # counted over dense pieces alone: ranks hold different numbers of experts
    for pieces, tensors in parameters_here(model, optimizer):
        marked = []
        for piece in pieces:
            first = piece.cut is None or piece.cut.place == 0
            if sharded:
                mine = len(tensors) > 1 and first
            elif piece.index is None:
                mine = dense % mesh.layout.ranks == mesh.rank
                dense += 1
            else:
                mine = piece.index % mesh.layout.expert_data == mesh.expert_copy and first
            marked.append((piece, mine))
        yield marked, tensors


def prepare_moments(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Gives every parameter whose state is here moments, those that it has or new ones, and its number of updates.

    What the moments hold is for the caller to say.
    """
    for holder in state_holders(optimizer):
        for group in holder.param_groups:
            for parameter in group["params"]:
                step = torch.tensor(float(updates), dtype=torch.float32, device=parameter.device)
                before = holder.state.get(parameter, {})
                new = {moment: torch.empty_like(parameter) for moment in MOMENTS if moment not in before}
                holder.state[parameter] = {**before, **new, "step": step}
