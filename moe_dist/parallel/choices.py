"""The (expert, token) choices that go with tokens, when a token travels once for all of its experts on a rank.

Shape letters: T tokens here, K experts per token, N kept choices here, W ranks of the expert group, L experts here,
M tokens received, R choices received (rows at the experts).

A choice travels as one integer, `place * L + expert`: the place of its token among those sent to that rank, and the
expert's number on that rank. Choices are sent in the order of their tokens, and of a token's choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.fan import Fan


@dataclass(frozen=True)
class Departures:
    """The choices of this rank, by owner, a pure function of the plan.

    Attributes:
        owner_N: Rank that holds the expert of every row of the plan.
        order_N: Rows of the plan in the order in which their choices travel: owner, then token, then choice.
        slot_N: Slot `t*K + k` of every choice, in that order.
        counts: Choices for each rank.
    """

    owner_N: Tensor
    order_N: Tensor
    slot_N: Tensor
    counts: list[int]


def list_departures(plan: RoutingPlan, experts_by_rank: list[int]) -> Departures:
    """Orders the kept choices of a plan by owner; ranks own neighbouring experts, `experts_by_rank[w]` each."""
    counts = [int(part.sum()) for part in plan.served_E.split(experts_by_rank)]
    ranks_W = torch.arange(len(counts), device=plan.slot_N.device)
    owner_N = ranks_W.repeat_interleave(torch.tensor(counts, device=plan.slot_N.device))
    order_N = torch.argsort(owner_N * plan.row_TK.numel() + plan.slot_N)
    return Departures(owner_N, order_N, plan.slot_N[order_N], counts)


def expert_of_rows(plan: RoutingPlan) -> Tensor:
    """Expert of every row of a plan, int64 [N]."""
    experts_E = torch.arange(plan.served_E.numel(), device=plan.served_E.device)
    return experts_E.repeat_interleave(plan.served_E)


def crossing_tokens(plan: RoutingPlan, owner_N: Tensor, ranks: int) -> Tensor:
    """Whether a token has a kept choice at a rank, bool [W, T]."""
    crosses_WT = torch.zeros(ranks, plan.row_TK.shape[0], dtype=torch.bool, device=plan.slot_N.device)
    crosses_WT[owner_N, plan.token_N] = True
    return crosses_WT


def encode_choices(plan: RoutingPlan, departures: Departures, experts_by_rank: list[int], place_WT: Tensor) -> Tensor:
    """The integer of every choice, int64 [N], in the order in which they travel.

    Args:
        plan: The plan.
        departures: Its choices by owner.
        experts_by_rank: Experts of each rank.
        place_WT: Place of a token among those sent to a rank, int64.
    """
    held_W = torch.tensor(experts_by_rank, device=place_WT.device)
    first_W = held_W.cumsum(0) - held_W
    owner_N = departures.owner_N
    code_N = place_WT[owner_N, plan.token_N] * held_W[owner_N] + expert_of_rows(plan) - first_W[owner_N]
    return code_N[departures.order_N]


@dataclass(frozen=True)
class Arrivals:
    """Rows at the experts, from the tokens and choices that were received.

    Attributes:
        fan: From received tokens (by source, as sent) to rows sorted by expert, then source, then token.
        order_R: For every row, its place among the received choices.
        counts_L: Rows of each expert here.
    """

    fan: Fan
    order_R: Tensor
    counts_L: list[int]


def arrange_arrivals(code_R: Tensor, tokens_in: list[int], choices_in: list[int], experts: int) -> Arrivals:
    """Reads the received choices.

    Args:
        code_R: Integers by source, as `encode_choices` made them there.
        tokens_in: Tokens from each source.
        choices_in: Choices from each source.
        experts: Experts here (L).
    """
    tokens_W = torch.tensor(tokens_in, device=code_R.device)
    first_W = tokens_W.cumsum(0) - tokens_W
    offset_R = first_W.repeat_interleave(torch.tensor(choices_in, device=code_R.device))
    token_R, expert_R = offset_R + code_R // experts, code_R % experts
    order_R = torch.sort(expert_R, stable=True).indices
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(order_R.numel(), device=code_R.device)
    # Choices arrive sorted by token, so `row_R` lists the rows of every token one after the other.
    rows_M = torch.bincount(token_R, minlength=sum(tokens_in))
    return Arrivals(Fan.of(rows_M, row_R), order_R, torch.bincount(expert_R, minlength=experts).tolist())
