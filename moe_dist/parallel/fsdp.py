"""Fully sharded data parallelism: ranks that hold the same parameters keep a part of each, and meet for the products.

PyTorch's FSDP2 gathers the parameters of a block before it runs and again in the backward pass, and sums gradients into
the parts. There are two foldings of the ranks, so there are two groups: the dense parameters of a block are cut over
the ranks that hold the same cut of them, its experts over the ranks that hold the same cut of the same experts.
Gradients are plain sums as everywhere (law 2): FSDP's division by the number of ranks is switched off. What a tensor
group holds alike is summed over that group afterwards, by `Gradients`.

A parameter is cut along its first dimension: a matrix by rows, stacked experts by expert. Ranks may hold none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from moe_dist.model.transformer import Transformer
from moe_dist.parallel.mesh import Mesh


def shard_parameters(model: Transformer, mesh: Mesh) -> None:
    """Leaves every rank its part of the parameters, where the layout shares them out; after all that cuts or wraps."""
    layout = mesh.layout
    whole_experts = {p for _, layer in model.moe_layers() for p in layer.experts.parameters()}
    if layout.expert_shard > 1 and mesh.experts_here:
        over = _device_mesh(mesh.expert_data, mesh.expert_shard, mesh.expert_copies)
        for _, layer in model.moe_layers():
            fully_shard(layer.experts, mesh=over, reshard_after_forward=True)
            register_fsdp_forward_method(layer.experts, "of_tokens")
        whole_experts = set()
    if layout.data_shard > 1:
        over = _device_mesh(mesh.data, mesh.data_shard, mesh.data_copies)
        for block in model.blocks:
            fully_shard(block, mesh=over, reshard_after_forward=True, ignored_params=whole_experts)
        # What is left stays whole after the forward pass: the loss reads the output weights.
        fully_shard(model, mesh=over, reshard_after_forward=False, ignored_params=whole_experts)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def part_again(model: Transformer) -> None:
    """Gives back what a forward pass without a backward pass left whole."""
    for module in _sharded_modules(model):
        module.reshard()


def whole(held: Tensor) -> Tensor:
    """A parameter, gradient or moment as this rank would hold it were it not sharded; entered by all that share it."""
    return held.full_tensor() if isinstance(held, DTensor) else held


def local(held: Tensor) -> Tensor:
    """The part that is here, sharing its memory."""
    return held.to_local().detach() if isinstance(held, DTensor) else held.detach()


def rows_here(held: Tensor) -> range:
    """Which places along the first dimension are here: those of a matrix's rows, or of stacked experts."""
    if not isinstance(held, DTensor):
        return range(len(held))
    last = held.device_mesh.ndim - 1
    each = -(-len(held) // held.device_mesh.size(last))
    start = min(held.device_mesh.get_local_rank(last) * each, len(held))
    return range(start, min(start + each, len(held)))


@contextmanager
def filling(held: Tensor) -> Iterator[Tensor]:
    """What is to be written as if all of it were here; of it this rank keeps its part."""
    if not isinstance(held, DTensor):
        yield held
        return
    buffer = torch.empty(held.shape, dtype=held.dtype, device=held.device)
    yield buffer
    rows = rows_here(held)
    local(held).copy_(buffer[rows.start : rows.stop])


def _sharded_modules(model: Transformer) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _device_mesh(
    alike: dist.ProcessGroup, shard: dist.ProcessGroup | None, copies: dist.ProcessGroup | None
) -> DeviceMesh:
    """Ranks that hold the same, as FSDP2 wants them: in a line, or a row for each copy that is shared out.

    The groups' names are part of it: DTensor remembers operations by what a mesh compares equal to, and would hand on
    another one of the same ranks, whose groups differ or are closed.
    """
    assert shard is not None, "a layout that shards has a group for it"
    kind = "cuda" if dist.get_backend(shard) == "nccl" else "cpu"
    groups = [shard] if copies is None else [copies, shard]
    ranks = torch.tensor(dist.get_process_group_ranks(alike))
    names = tuple(f"group_{group.group_name}" for group in groups)
    if copies is None:
        return DeviceMesh.from_group(shard, kind, mesh_dim_names=names)
    return DeviceMesh.from_group(groups, kind, ranks.view(-1, shard.size()), mesh_dim_names=names)
