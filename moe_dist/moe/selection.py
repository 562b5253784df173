"""Choosing experts from scores: selection bias, group limit, top-k.

Shape letters: T tokens, E experts, K experts per token, J groups of neighbouring experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.moe.ledger import Choices


def choose_experts(
    logits_TE: Tensor, score_TE: Tensor, bias_E: Tensor | None, config: MoEConfig, follow: Choices | None = None
) -> Tensor:
    """The `top_k` experts of every token, int64 [T, K], best first; ties go to the lower expert id.

    Args:
        logits_TE: Raw scores. Without bias and groups they decide: the order is that of `score_TE`, and they do not
            become equal where a sigmoid is rounded to 0 or 1.
        score_TE: Softmax or sigmoid of the logits, to which a bias is added.
        bias_E: Selection bias, or None.
        config: `top_k`, `num_groups`, `groups_per_token`, `group_score_experts`.
        follow: Choices that are taken as they are.
    """
    if follow is not None:
        return follow.expert_TK
    choice_TE = (logits_TE if bias_E is None and config.num_groups == 1 else score_TE).detach()
    if bias_E is not None:
        choice_TE = choice_TE + bias_E
    if config.num_groups > 1:
        choice_TE = limit_to_groups(choice_TE, config.num_groups, config.groups_per_token, config.group_score_experts)
    return torch.sort(choice_TE, dim=-1, descending=True, stable=True).indices[:, : config.top_k]


def limit_to_groups(choice_TE: Tensor, num_groups: int, groups_per_token: int, scored_by: int = 2) -> Tensor:
    """Scores with all but the best groups of experts at minus infinity.

    A group's score is the sum of its `scored_by` highest scores, bias included. Masking with 0, as some code does, lets
    a masked expert win where the scores that are left are negative.

    Source: DeepSeek-V3 (2024), section 2.1.2 "node-limited routing", with the sum of two as in its published code;
    DeepSeek-V2 (2024), section 2.1.2 "device-limited routing", with the best one.
    """
    choice_TJe = choice_TE.unflatten(-1, (num_groups, -1))
    group_TJ = choice_TJe.topk(min(scored_by, choice_TJe.shape[-1]), dim=-1).values.sum(-1)
    best = torch.sort(group_TJ, dim=-1, descending=True, stable=True).indices[:, :groups_per_token]
    closed_TJ = torch.ones_like(group_TJ, dtype=torch.bool).scatter_(1, best, False)
    return choice_TJe.masked_fill(closed_TJ[..., None], float("-inf")).flatten(1)


def moved_bias(bias_E: Tensor, demand_E: Tensor, rate: float) -> Tensor:
    """The selection bias after a step: up by `rate` where demand was below its mean, down where it was above.

    Args:
        bias_E: fp32.
        demand_E: Assignments of the whole global batch before drops, int64. The comparison is one of whole numbers.
        rate: Size of a move.

    Source: Wang et al. 2024 (auxiliary-loss-free load balancing), algorithm 1.
    """
    below_mean_E = torch.sign(demand_E.sum() - demand_E * demand_E.numel())
    return bias_E + rate * below_mean_E.to(bias_E.device, bias_E.dtype)
