"""Collectives with an explicit group. Shape letters: N rows before the exchange, R rows after it, D width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel.waits import waiting


class Voyage:
    """One uneven all-to-all from its start until it is waited for.

    It holds on to the tensors that are read and filled in the background, which nothing else may do until then.

    Args:
        send: Rows for each rank of the group.
        receive: Rows from each rank of the group, as they announced.
        group: The ranks.
    """

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._work: Any = None
        self._held: tuple[Tensor, Tensor] | None = None

    def start(self, rows_ND: Tensor) -> Tensor:
        """Sends rows ordered by destination; returns where [R, D] will be, ordered by source."""
        rows_ND = rows_ND.contiguous()
        out_RD = rows_ND.new_empty(sum(self.receive), *rows_ND.shape[1:])
        self._work = dist.all_to_all_single(out_RD, rows_ND, self.receive, self.send, group=self.group, async_op=True)
        self._held = (out_RD, rows_ND)
        return out_RD

    def wait(self) -> Tensor:
        """What was received. On NCCL the current stream waits, not the host."""
        assert self._held is not None, "a voyage is started before it is waited for"
        with waiting():
            self._work.wait()
        out_RD, _ = self._held
        self._work = self._held = None
        return out_RD


@dataclass(frozen=True)
class Underway:
    """Rows that are being exchanged.

    Attributes:
        buffer_RD: Where they will be; `arrived_rows` says when.
        out: The exchange itself.
        back: That of their gradients, in the backward pass.
    """

    buffer_RD: Tensor
    out: Voyage
    back: Voyage


def start_rows(rows_ND: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Underway:
    """Starts sending `send[w]` neighbouring rows to each rank w of the group; differentiable.

    Forward and backward are the same pair of moves: the backward of waiting starts the exchange of gradients, the
    backward of starting waits for it. What lies between start and wait in the forward pass therefore lies between them
    in the backward pass too: autograd runs those nodes that are ready in falling order of their sequence numbers, so
    the backward pass is the forward pass reversed, node by node. That also makes every rank enter the exchanges of a
    backward pass in the same order, as long as all ranks enter those of the forward pass alike, empty ones included.

    Args:
        rows_ND: Rows ordered by destination.
        send: Rows for each rank of the group.
        receive: Rows from each rank of the group, as they announced.
        group: The ranks.
    """
    out, back = Voyage(send, receive, group), Voyage(receive, send, group)
    return Underway(_Start.apply(rows_ND, out, back), out, back)


def arrived_rows(underway: Underway) -> Tensor:
    """Waits; [R, D], ordered by source."""
    return _Wait.apply(underway.buffer_RD, underway.out, underway.back)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, out: Voyage, back: Voyage) -> Tensor:
        ctx.back = back
        return out.start(rows_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back.wait(), None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer_RD: Tensor, out: Voyage, back: Voyage) -> Tensor:
        ctx.back = back
        return out.wait().detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.back.start(grads[0])
        # Autograd wants a gradient of the buffer's shape; the real one is under way, and `_Start` does not read this.
        return grads[0], None, None


def exchange_integers(values: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends `send[w]` neighbouring integers to each rank w; returns those received, ordered by source."""
    voyage = Voyage(send, receive, group)
    voyage.start(values)
    return voyage.wait()


def exchange_counts(counts: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Tells every rank of the group how many rows each of its experts will get from here.

    Args:
        counts: Rows for every expert of the group, int64 [E], ordered by owner.
        sizes: Experts of each rank of the group.

    Returns:
        int64 [ranks of the group, experts here]: rows from each source for each expert here.
    """
    here = sizes[dist.get_rank(group)]
    received = counts.new_empty(len(sizes) * here)
    with waiting():
        dist.all_to_all_single(received, counts.contiguous(), [here] * len(sizes), sizes, group=group)
    return received.view(len(sizes), here)


def sum_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group, in place and returned; not differentiable."""
    with waiting():
        dist.all_reduce(value, op=dist.ReduceOp.SUM, group=group)
    return value


def summed(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group, of which every rank makes another part of the loss: its gradient is summed as well."""
    return _Sum.apply(value, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_ranks(value.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_ranks(grads[0].clone(), ctx.group), None


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """A small plain value of every rank of the group, in order of rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    with waiting():
        dist.all_gather_object(values, value, group=group)
    return values


def from_first(value: Any, group: dist.ProcessGroup) -> Any:
    """The value that the first rank of the group gave, on every rank."""
    held = [value]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else None
    with waiting():
        dist.broadcast_object_list(held, group_src=0, group=group, device=device)
    return held[0]
