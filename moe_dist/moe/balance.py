"""Balance terms and load statistics: pure functions of the decision and the plan.

Shape letters: B sequences, S tokens of a sequence, T tokens, E experts, X sets of tokens, each balanced by itself.

Each loss term is returned as a *sum over counted tokens* of this process; the step divides by the global number of
counted tokens, so that adding the terms of all ranks and micro-batches gives the term of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_sum(probability_XE: Tensor, demand_XE: Tensor) -> Tensor:
    """Sum over sets of tokens of (counted tokens) * E * sum_i f_i P_i, each set by itself.

    Source: Fedus et al. 2022 (Switch), equations 4-6, with f over the T*K assignments so that even load gives 1 for any
    K; per sequence as DeepSeek-V3 (2024), equations 17-20, which normalises the same way. A set may be a sequence, a
    micro-batch, or the global batch, of which this process holds some tokens: what is balanced depends on whose demand
    is given, and the gradient on the tokens here alone.

    Args:
        probability_XE: Probabilities summed over the counted tokens that are here, which is (tokens) * P.
        demand_XE: Assignments to each expert before drops, over all tokens of the set; [1, E] is one set for all rows.
    """
    asked_X1 = demand_XE.sum(-1, keepdim=True).clamp(min=1)
    fraction_XE = demand_XE.to(probability_XE.dtype) / asked_X1
    return probability_XE.shape[-1] * (fraction_XE * probability_XE).sum()


def sum_in_groups(value_XE: Tensor, num_groups: int) -> Tensor:
    """Adds up groups of neighbouring experts, [X, groups].

    `balance_sum` of sums in groups is the balance loss over groups. Source: DeepSeek-V2 (2024), equations 26-28
    (device level): sum_j f'_j P'_j with f'_j the mean of `E / (K T) * assignments` over the experts of group j and P'_j
    the sum of their P. That mean is (groups) * (the group's share of the assignments): even load gives 1, as published.
    """
    return value_XE.unflatten(-1, (num_groups, -1)).sum(-1)


def probability_by_sequence(probability_TE: Tensor, counted_BS: Tensor | None, length: int) -> Tensor:
    """Probabilities summed over the counted tokens of each sequence, [B, E]; `length` is S."""
    probability_BSE = probability_TE.view(-1, length, probability_TE.shape[-1])
    if counted_BS is not None:
        probability_BSE = probability_BSE * counted_BS[..., None]
    return probability_BSE.sum(1)


def entropy_sum(probability_TE: Tensor, counted_BS: Tensor | None) -> Tensor:
    """Sum over counted tokens of the router's entropy -sum_i p_i log p_i, in nats; no gradient."""
    entropy_T = torch.special.entr(probability_TE.detach()).sum(-1)
    if counted_BS is not None:
        entropy_T = entropy_T * counted_BS.reshape(-1)
    return entropy_T.sum()


def z_sum(logits_TE: Tensor, counted_BS: Tensor | None) -> Tensor:
    """Sum over counted tokens of the squared log-partition of the router. Source: Zoph et al. 2022 (ST-MoE), eq. 5."""
    square_T = torch.logsumexp(logits_TE, dim=-1).square()
    if counted_BS is not None:
        square_T = square_T * counted_BS.reshape(-1)
    return square_T.sum()


def demand_by_sequence(
    expert_TK: Tensor, counted_BS: Tensor | None, length: int, num_experts: int, asks_TK: Tensor | None = None
) -> Tensor:
    """Assignments of counted tokens to each expert, by sequence, int64 [B, E]; choices not carried out are none."""
    choices_BN = expert_TK.reshape(-1, length * expert_TK.shape[1])
    weight_BN = torch.ones_like(choices_BN)
    if counted_BS is not None:
        weight_BN = counted_BS.long().repeat_interleave(expert_TK.shape[1], dim=1)
    if asks_TK is not None:
        weight_BN = weight_BN * asks_TK.view_as(choices_BN)
    return choices_BN.new_zeros(choices_BN.shape[0], num_experts).scatter_add_(1, choices_BN, weight_BN)


def max_over_mean(load: Tensor) -> float:
    """Maximum over mean: 1 is perfect balance; 1 where there is no load."""
    mean = load.double().mean()
    return float(load.max() / mean) if mean > 0 else 1.0


def max_violation(load_E: Tensor) -> float:
    """MaxVio: maximum load over mean load, less 1; 0 is perfect balance. Source: Wang et al. 2024, equation 4."""
    return max_over_mean(load_E) - 1
