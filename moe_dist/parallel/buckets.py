"""Gradients in buckets, each summed over its ranks in one collective that may run beside the backward pass.

Buckets, their order and their groups follow from the layout alone, so that every rank starts the same sums in the same
order: the last of the model first, as the backward pass meets them, and none before those ahead of it were started.
The exchanges of tokens in the same backward pass go over other groups. Gloo does not mind how ranks mix the two. NCCL
might, where kernels wait for each other; but every rank runs the same graph, empty micro-batches too, so that a bucket
starts at the same place among the exchanges on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.parallel.waits import waiting

BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Share:
    """A parameter and what decides about its bucket.

    Attributes:
        parameter: Of this rank.
        group: The ranks whose gradients are summed.
        most_bytes: Of this parameter on the rank that holds most of it; ranks hold different numbers of experts, and
            must still cut alike.
    """

    parameter: nn.Parameter
    group: dist.ProcessGroup
    most_bytes: int


@dataclass
class Bucket:
    """Parameters of one group and type.

    Attributes:
        waiting: Those whose gradient is still to come in this backward pass.
        work: The sum under way.
    """

    group: dist.ProcessGroup
    parameters: list[nn.Parameter] = field(default_factory=list)
    waiting: set[nn.Parameter] = field(default_factory=set)
    work: Any = None

    def start(self) -> None:
        """Starts the sum; the gradients become views of what is summed, and are not read until it has ended."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        assert len(grads) == len(self.parameters), "every gradient is filled before it is summed"
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        parts = flat.split([grad.numel() for grad in grads])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self.work = dist.all_reduce(flat, group=self.group, async_op=True)


class Buckets:
    """The sums of a step.

    Args:
        shares: All parameters in the order of the model. Those whose group is one rank have nothing to sum.
        overlap: Sums start during the backward pass that `expect` announces; else all at its end.
    """

    def __init__(self, shares: list[Share], overlap: bool) -> None:
        self.buckets = _cut([share for share in reversed(shares) if dist.get_world_size(share.group) > 1])
        self.started, self.expecting = 0, False
        if overlap:
            for bucket in self.buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket))

    def expect(self) -> None:
        """The next backward pass is the last of the step: its gradients are whole as they come."""
        self.started, self.expecting = 0, True
        for bucket in self.buckets:
            bucket.waiting = set(bucket.parameters)

    def finish(self) -> None:
        """Starts in order what has not been started, a parameter without a gradient counting as zero; waits for all."""
        for bucket in self.buckets[self.started :]:
            for parameter in bucket.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            bucket.start()
        for bucket in self.buckets:
            with waiting():
                bucket.work.wait()
            bucket.work = None
        self.started, self.expecting = 0, False

    def _arrived(self, bucket: Bucket, parameter: nn.Parameter) -> None:
        if not self.expecting:
            return
        assert parameter in bucket.waiting, "a gradient came twice in one backward pass, perhaps after it was summed"
        bucket.waiting.remove(parameter)
        while self.started < len(self.buckets) and not self.buckets[self.started].waiting:
            self.buckets[self.started].start()
            self.started += 1


def _cut(shares: list[Share]) -> list[Bucket]:
    """Parameters of one group and type together, to about BUCKET_BYTES; a bucket stands where it was full."""
    buckets: list[Bucket] = []
    opened: dict[tuple[dist.ProcessGroup, torch.dtype], tuple[Bucket, int]] = {}
    for share in shares:
        kind = (share.group, share.parameter.dtype)
        bucket, size = opened.pop(kind, (Bucket(share.group), 0))
        if bucket.parameters and size + share.most_bytes > BUCKET_BYTES:
            buckets.append(bucket)
            bucket, size = Bucket(share.group), 0
        bucket.parameters.append(share.parameter)
        opened[kind] = (bucket, size + share.most_bytes)
    return buckets + [bucket for bucket, _ in opened.values()]
