"""A token that travels once and fans out into several rows, and the way back: sums over the rows of a source.

Shape letters: M sources, R rows (of all sources), D model width.

    source   0    1    2          source 0 has rows 1 and 4, source 1 has none, source 2 has rows 0, 2 and 3
    rows    1 4   -  0 2 3

    fan_out   rows[r] = x[source_R[r]]                         its gradient is a fan_in
    fan_in    out[m] = sum over the rows r of m of weight[r] * rows[r]

Sums are made without a scatter, always in the order in which a source lists its rows: sources stand by their number
of rows, largest first, so that pass j adds the j-th row of all that have one to the head of one buffer. The work is R
rows, however unevenly they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fan:
    """Which rows belong to which source.

    Attributes:
        source_R: Source of every row, int64.
        passes: Pass j: the j-th row of every source that has so many, sources with most rows first, int64.
        place_M: Place of every source in that order, int64.
    """

    source_R: Tensor
    passes: tuple[Tensor, ...]
    place_M: Tensor

    @staticmethod
    def of(rows_M: Tensor, row_R: Tensor) -> Fan:
        """Builds the map.

        Args:
            rows_M: Rows of each source, int64.
            row_R: Rows of source 0 in the order of their sum, then those of source 1, ...; a permutation, int64.
        """
        sources_M = torch.arange(rows_M.numel(), device=rows_M.device)
        source_R = torch.empty_like(row_R)
        source_R[row_R] = sources_M.repeat_interleave(rows_M)
        largest_first_M = torch.sort(rows_M, descending=True, stable=True).indices
        start_M = (rows_M.cumsum(0) - rows_M)[largest_first_M]
        # Sources with more than j rows, for j = 0, 1, ...; the last entry is zero.
        reach = torch.bincount(rows_M, minlength=1).flip(0).cumsum(0).flip(0)[1:].tolist()
        passes = tuple(row_R[start_M[:count] + j] for j, count in enumerate(reach))
        place_M = torch.empty_like(largest_first_M)
        place_M[largest_first_M] = sources_M
        return Fan(source_R, passes, place_M)


def fan_of_crossings(crosses_WT: Tensor) -> Fan:
    """From tokens to crossings (True of [W, T]), which stand by rank, then token; they are summed in order of rank."""
    crossing_WT = crosses_WT.reshape(-1).cumsum(0).view_as(crosses_WT) - 1
    return Fan.of(crosses_WT.sum(0), crossing_WT.T[crosses_WT.T])


def fan_out(x_MD: Tensor, fan: Fan) -> Tensor:
    """`rows[r] = x[source_R[r]]`, [R, D]; differentiable."""
    return _FanOut.apply(x_MD, fan)


def fan_in(rows_RD: Tensor, weight_R: Tensor | None, fan: Fan) -> Tensor:
    """`out[m] = sum of weight[r] * rows[r] over the rows of m`, [M, D] in the type of `rows_RD`; differentiable.

    Without weights each is one. The sum is made in the widest of the two types and fp32.
    """
    return _FanIn.apply(rows_RD, weight_R, fan)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, fan: Fan) -> Tensor:
        ctx.fan = fan
        return x_MD.index_select(0, fan.source_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grads[0], None, ctx.fan), None


class _FanIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_R: Tensor | None, fan: Fan) -> Tensor:
        ctx.fan = fan
        ctx.save_for_backward(*(() if weight_R is None else (rows_RD, weight_R)))
        return sum_rows(rows_RD, weight_R, fan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_RD = grads[0].index_select(0, ctx.fan.source_R)
        kept = ctx.saved_tensors  # asked for once: what a checkpoint computed again is there once
        if not kept:
            return grad_RD, None, None
        rows_RD, weight_R = kept
        with torch.autocast(grad_RD.device.type, enabled=False):
            slope_R = torch.linalg.vecdot(grad_RD.to(weight_R.dtype), rows_RD.to(weight_R.dtype))
        return (grad_RD * weight_R[:, None]).to(rows_RD.dtype), slope_R, None


def sum_rows(rows_RD: Tensor, weight_R: Tensor | None, fan: Fan) -> Tensor:
    """The sum of every source's rows, weighted where weights are given; not differentiable by itself."""
    wide = torch.promote_types(rows_RD.dtype, torch.float32 if weight_R is None else weight_R.dtype)
    wide = torch.promote_types(wide, torch.float32)
    sums_MD = rows_RD.new_zeros((fan.place_M.numel(), rows_RD.shape[1]), dtype=wide)
    for pass_rows in fan.passes:
        head_MD = sums_MD[: pass_rows.numel()]
        picked = rows_RD.index_select(0, pass_rows).to(wide)
        if weight_R is None:
            head_MD.add_(picked)
        else:
            head_MD.addcmul_(picked, weight_R.index_select(0, pass_rows).to(wide)[:, None])
    return sums_MD.index_select(0, fan.place_M).to(rows_RD.dtype)
