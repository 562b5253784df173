"""Collectives with an explicit group. Shape letters: N rows before the exchange, R rows after it, D width."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all_rows(rows_ND: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends `send[w]` neighbouring rows to each rank w of the group; differentiable.

    Args:
        rows_ND: Rows ordered by destination.
        send: Rows for each rank of the group.
        receive: Rows from each rank of the group, as they announced.

    Returns:
        [R, D], ordered by source.
    """
    return _AllToAllRows.apply(rows_ND, send, receive, group)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = (receive, send, group)
        return _exchange(rows_ND, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], *ctx.way_back), None, None, None


def _exchange(rows_ND: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out_RD = rows_ND.new_empty(sum(receive), *rows_ND.shape[1:])
    dist.all_to_all_single(out_RD, rows_ND.contiguous(), receive, send, group=group)
    return out_RD


def all_gather_rows(x_TD: Tensor, tokens_W: list[int], group: dist.ProcessGroup) -> Tensor:
    """Everybody's rows, ordered by rank, on every rank, [sum of `tokens_W`, D]; differentiable.

    Ranks may hold unequal numbers of rows, which `all_gather` of gloo refuses; so each rank sends its rows to every
    other by an uneven all-to-all. The gradient of a row is the sum over the ranks, in their order.

    Args:
        x_TD: Rows of this rank.
        tokens_W: Rows of each rank of the group, as they announced.
        group: The ranks.
    """
    return _AllGatherRows.apply(x_TD, tokens_W, group)


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_W: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = (tokens_W, [x_TD.shape[0]] * len(tokens_W), group)
        copies = x_TD.expand(len(tokens_W), *x_TD.shape).flatten(0, 1)
        return _exchange(copies, [x_TD.shape[0]] * len(tokens_W), tokens_W, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_by_rank(_exchange(grads[0], *ctx.way_back), len(ctx.way_back[0])), None, None


def sum_by_rank(parts_WTD: Tensor, ranks: int) -> Tensor:
    """Sums rows [ranks * T, D] over ranks, in their order and in fp32 or wider, to [T, D] of the same type."""
    total_TD, *others = parts_WTD.chunk(ranks) if parts_WTD.shape[0] else [parts_WTD]
    wide = torch.promote_types(parts_WTD.dtype, torch.float32)
    total_TD = total_TD.to(wide)
    for part_TD in others:
        total_TD = total_TD + part_TD
    return total_TD.to(parts_WTD.dtype)


def exchange_integers(values: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends `send[w]` neighbouring integers to each rank w; returns those received, ordered by source."""
    return _exchange(values, send, receive, group)


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
    dist.all_to_all_single(received, counts.contiguous(), [here] * len(sizes), sizes, group=group)
    return received.view(len(sizes), here)


def sum_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group, in place and returned; not differentiable."""
    dist.all_reduce(value, op=dist.ReduceOp.SUM, group=group)
    return value


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """A small plain value of every rank of the group, in order of rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_first(value: Any, group: dist.ProcessGroup) -> Any:
    """The value that the first rank of the group gave, on every rank."""
    held = [value]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else None
    dist.broadcast_object_list(held, group_src=0, group=group, device=device)
    return held[0]
