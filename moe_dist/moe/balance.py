"""Balance terms and load statistics: pure functions of the decision and the plan.

Shape letters: B sequences, S tokens of a sequence, T tokens, E experts.

Each loss term is returned as a *sum over counted tokens* of this process; the step divides by the global number of
counted tokens, so that adding the terms of all ranks and micro-batches gives the term of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_balance_sum(probability_TE: Tensor, demand_BE: Tensor, counted_BS: Tensor | None, length: int) -> Tensor:
    """Sum over sequences of (counted tokens) * E * sum_i f_i P_i, each sequence by itself.

    Source: Fedus et al. 2022 (Switch), equations 4-6, with f over the T*K assignments so that even load gives 1 for any
    K; per sequence as DeepSeek-V3 (2024), equations 17-20, which normalises the same way.

    Args:
        probability_TE: Router probabilities.
        demand_BE: Assignments of each sequence's counted tokens to each expert, before drops.
        counted_BS: False for padding; None where every token counts.
        length: S.
    """
    probability_BSE = probability_TE.view(-1, length, probability_TE.shape[-1])
    if counted_BS is not None:
        probability_BSE = probability_BSE * counted_BS[..., None]
    asked_B = demand_BE.sum(-1, keepdim=True).clamp(min=1)
    fraction_BE = demand_BE.to(probability_TE.dtype) / asked_B
    # (tokens) * P is the plain sum of the probabilities of the sequence.
    return probability_TE.shape[-1] * (fraction_BE * probability_BSE.sum(1)).sum()


def global_balance_sum(probability_TE: Tensor, global_demand_E: Tensor, counted_BS: Tensor | None) -> Tensor:
    """This process' part of (counted tokens) * E * sum_i f_i P_i over the whole global batch.

    Args:
        probability_TE: Router probabilities of the tokens here.
        global_demand_E: Assignments to each expert over all ranks, before drops.
        counted_BS: False for padding; None where every token counts.
    """
    if counted_BS is not None:
        probability_TE = probability_TE * counted_BS.reshape(-1, 1)
    fraction_E = global_demand_E.to(probability_TE.dtype) / global_demand_E.sum().clamp(min=1)
    return probability_TE.shape[-1] * (fraction_E * probability_TE.sum(0)).sum()


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


def max_violation(load_E: Tensor) -> float:
    """MaxVio: maximum load over mean load, less 1; 0 is perfect balance. Source: Wang et al. 2024, equation 4."""
    load = load_E.double()
    mean = load.mean()
    return float(load.max() / mean - 1) if mean > 0 else 0.0
