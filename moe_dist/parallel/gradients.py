"""Reducing gradients and measuring their global norm: dense and expert parameters, in one place.

Every reduction is a plain sum over the ranks that saw different tokens (law 2): parameters that all ranks hold over all
ranks, those that a tensor group shares over the ranks with the same cut, those of experts over the ranks that hold the
same experts. Tokens of a tensor group already met at the cut, those of the ranks of one expert group at the expert.
Parameters that are shared out (fsdp.py) have the sum over their data ranks already; what is missing is added here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dist.model.naming import cut_of, stacked_parameters
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.buckets import Buckets, Share
from moe_dist.parallel.collectives import sum_ranks
from moe_dist.parallel.fsdp import local
from moe_dist.parallel.mesh import Mesh


def reduction_group(model: Transformer, name: str, mesh: Mesh) -> dist.ProcessGroup:
    """The ranks that hold the same as this one under a parameter's name, and whose gradients of it are summed."""
    if name in stacked_parameters(model):
        return mesh.expert_data
    return mesh.data if cut_of(model, name) else mesh.world


class Gradients:
    """The gradients of a parallel model; every method is entered by all ranks."""

    def __init__(self, model: Transformer, mesh: Mesh, overlap: bool = False) -> None:
        stacked = stacked_parameters(model)
        parameters = dict(model.named_parameters())
        self.mesh = mesh
        self.experts = [parameters[name] for name in stacked]
        self.cut = [p for name, p in parameters.items() if name not in stacked and cut_of(model, name)]
        self.dense = [p for name, p in parameters.items() if name not in stacked and not cut_of(model, name)]
        self._shared_out = [p for p in self.dense if isinstance(p, DTensor)]
        most_experts = max(len(mesh.layout.experts_of(place)) for place in range(mesh.layout.expert))
        shares = []
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                continue  # summed into the parts as the backward pass makes it
            most = parameter[:1].nbytes * most_experts if name in stacked else parameter.nbytes
            shares.append(Share(parameter, reduction_group(model, name, mesh), most))
        self.buckets = Buckets(shares, overlap)

    def expect_last(self) -> None:
        """Announces the backward pass of the last micro-batch, beside which sums may start."""
        self.buckets.expect()

    def reduce(self) -> None:
        """Sums every gradient over the ranks that saw other tokens; a missing gradient counts as zero."""
        self.buckets.finish()
        for parameter in self.dense + self.cut + self.experts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.mesh.layout.tensor > 1 and self._shared_out:
            _sum_together([_grad(parameter) for parameter in self._shared_out], self.mesh.tensor)

    def norm(self) -> Tensor:
        """The 2-norm over all parameters of the whole model, each counted once; fp64 scalar, equal on all ranks."""
        device = self.dense[0].device
        dense, cut, experts = (_square(kind, device) for kind in (self.dense, self.cut, self.experts))
        if self.mesh.data_shard is not None:
            dense, cut = sum_ranks(torch.stack([dense, cut]), self.mesh.data_shard).unbind()
        if self.mesh.expert_shard is not None:
            experts = sum_ranks(experts, self.mesh.expert_shard)
        experts = sum_ranks(sum_ranks(experts, self.mesh.expert), self.mesh.expert_tensor)
        return (experts + sum_ranks(cut.clone(), self.mesh.tensor) + dense).sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiplies every gradient."""
        for parameter in self.dense + self.cut + self.experts:
            grad = _grad(parameter)
            grad.mul_(factor.to(grad.dtype))

    def clip(self, limit: float | None) -> Tensor:
        """Scales all gradients so that the global norm is at most `limit`; returns the norm before."""
        norm = self.norm()
        if limit is not None and float(norm) > limit:
            self.scale(limit / norm)
        return norm


def _square(parameters: list[torch.nn.Parameter], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    grads = [grad for grad in map(_grad, parameters) if grad.numel()]
    if grads:
        norms = torch._foreach_norm(grads)
        total += torch.stack([norm.double() for norm in norms]).square().sum()
    return total


def _grad(parameter: torch.nn.Parameter) -> Tensor:
    """The part of a gradient that is here, sharing its memory."""
    assert parameter.grad is not None, "reduce() fills every gradient"
    return local(parameter.grad)


def _sum_together(parts: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors over ranks in one collective, in place."""
    flat = sum_ranks(torch.cat([part.flatten() for part in parts]), group)
    for part, value in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view_as(part))
