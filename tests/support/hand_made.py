"""Hand-made choices for dispatchers, and simple experts.

Shape letters: T tokens of a rank, D model width, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.wire import ItemBytes

WIDTH = 5


@dataclass(frozen=True)
class Case:
    """Choices of every rank: tokens of each, how they choose, and what is kept of it."""

    tokens: tuple[int, ...] = (6, 4, 9)
    experts: int = 7  # over three ranks: 2, 2, 3
    top_k: int = 3
    only: tuple[int, ...] = ()  # the experts that are chosen from; all where empty
    kept: float = 1.0  # share of the choices that are kept
    padded_rank: int | None = None  # a rank of padding only
    dtype: torch.dtype = torch.float64
    experts_dtype: torch.dtype | None = None  # of the experts' products and output, where it is another

    @property
    def item(self) -> ItemBytes:
        """Bytes of what travels."""
        result = self.experts_dtype or self.dtype
        return ItemBytes(WIDTH * self.dtype.itemsize, WIDTH * result.itemsize, self.dtype.itemsize)


@dataclass(frozen=True)
class Inputs:
    """What one rank starts from: tokens, gates, choices, those kept, and a slope for the output."""

    x_TD: Tensor
    gate_TK: Tensor
    expert_TK: Tensor
    kept_TK: Tensor
    slope_TD: Tensor


def inputs_of(case: Case, rank: int) -> Inputs:
    draw = torch.Generator().manual_seed(rank)
    tokens = case.tokens[rank]
    among = torch.tensor(case.only or tuple(range(case.experts)))
    expert_TK = among[torch.rand(tokens, len(among), generator=draw).argsort(1)[:, : case.top_k]]
    kept_TK = torch.rand(tokens, case.top_k, generator=draw) < (0.0 if rank == case.padded_rank else case.kept)
    values = [torch.randn(tokens, n, generator=draw).to(case.dtype) for n in (WIDTH, case.top_k, WIDTH)]
    return Inputs(values[0], values[1], expert_TK, kept_TK, values[2])


def weights_of(case: Case) -> Tensor:
    draw = torch.Generator().manual_seed(99)
    return torch.randn(case.experts, WIDTH, WIDTH, generator=draw).to(case.dtype)


def plan_of(expert_TK: Tensor, kept_TK: Tensor, experts: int) -> RoutingPlan:
    """The plan with exactly these choices kept, made the slow way."""
    kept, chosen = kept_TK.flatten().tolist(), expert_TK.flatten().tolist()
    slots = [s for e in range(experts) for s, (k, c) in enumerate(zip(kept, chosen, strict=True)) if k and c == e]
    slot_N = torch.tensor(slots, dtype=torch.int64)
    row_TK = torch.zeros_like(expert_TK)
    row_TK.view(-1)[slot_N] = torch.arange(len(slots))
    served_E = torch.bincount(expert_TK[kept_TK], minlength=experts)
    demand_E = torch.bincount(expert_TK.flatten(), minlength=experts)
    return RoutingPlan(slot_N, row_TK, kept_TK, demand_E, served_E)
