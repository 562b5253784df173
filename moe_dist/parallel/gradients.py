"""Reducing gradients and measuring their global norm: dense and expert parameters, in one place.

Every reduction is a plain sum over the ranks that saw different tokens (law 2): parameters that all ranks hold over all
ranks, those that a tensor group shares over the ranks with the same cut, those of experts over the ranks that hold the
same experts. Tokens of a tensor group already met at the cut, those of the ranks of one expert group at the expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.model.naming import cut_of, stacked_parameters
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.collectives import sum_ranks
from moe_dist.parallel.mesh import Mesh

BUCKET_BYTES = 25 * 2**20


class Gradients:
    """The gradients of a parallel model; every method is entered by all ranks."""

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        stacked = stacked_parameters(model)
        parameters = dict(model.named_parameters())
        self.mesh = mesh
        self.experts = [parameters[name] for name in stacked]
        self.cut = [p for name, p in parameters.items() if name not in stacked and cut_of(model, name)]
        self.dense = [p for name, p in parameters.items() if name not in stacked and not cut_of(model, name)]

    def reduce(self) -> None:
        """Sums every gradient over the ranks that saw other tokens; a missing gradient counts as zero."""
        for parameter in self.dense + self.cut + self.experts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        _sum_in_buckets(self.dense, self.mesh.world)
        _sum_in_buckets(self.cut, self.mesh.data)
        if self.mesh.layout.expert_data > 1:
            _sum_in_buckets(self.experts, self.mesh.expert_data)

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


def _sum_in_buckets(parameters: list[torch.nn.Parameter], group: dist.ProcessGroup) -> None:
    if dist.get_world_size(group) == 1:
        return
    for bucket in _buckets(parameters):
        flat = sum_ranks(torch.cat([grad.reshape(-1) for grad in bucket]), group)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[list[Tensor]]:
    """Gradients in order, cut into lists of about BUCKET_BYTES and of one type."""
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None, "every gradient is filled before it is summed"
        if bucket and (size + grad.nbytes > BUCKET_BYTES or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        yield bucket
