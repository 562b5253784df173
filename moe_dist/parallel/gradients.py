"""Reducing gradients and measuring their global norm: dense and expert parameters, in one place.

Every reduction is a plain sum over the ranks that saw different tokens (law 2): parameters that all ranks hold over all
ranks, those that a tensor group shares over the ranks with the same cut, those of experts over the ranks that hold the
same experts. Tokens of a tensor group already met at the cut, those of the ranks of one expert group at the expert.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.model.naming import cut_of, stacked_parameters
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.buckets import Buckets, Share
from moe_dist.parallel.collectives import sum_ranks
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
        most_experts = max(len(mesh.layout.experts_of(place)) for place in range(mesh.layout.expert))
        shares = []
        for name, parameter in parameters.items():
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

    def norm(self) -> Tensor:
        """The 2-norm over all parameters of the whole model, each counted once; fp64 scalar, equal on all ranks."""
        device = self.dense[0].device
        square = sum_ranks(sum_ranks(_square(self.experts, device), self.mesh.expert), self.mesh.expert_tensor)
        square += sum_ranks(_square(self.cut, device), self.mesh.tensor)
        return (square + _square(self.dense, device)).sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiplies every gradient."""
        for parameter in self.dense + self.cut + self.experts:
            assert parameter.grad is not None, "reduce() fills every gradient"
            parameter.grad.mul_(factor.to(parameter.grad.dtype))

    def clip(self, limit: float | None) -> Tensor:
        """Scales all gradients so that the global norm is at most `limit`; returns the norm before."""
        norm = self.norm()
        if limit is not None and float(norm) > limit:
            self.scale(limit / norm)
        return norm


def _square(parameters: list[torch.nn.Parameter], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None and parameter.numel()]
    if grads:
        norms = torch._foreach_norm(grads)
        total += torch.stack([norm.double() for norm in norms]).square().sum()
    return total
