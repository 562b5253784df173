"""The kinds of router as functions from logits to a decision, each as its paper writes it.

Shape letters: T tokens, E experts, K experts per token. All arithmetic is in the type of the logits, fp32 or wider, and
every normalisation is a softmax of logits or of log-scores: there is no epsilon in a denominator, so that
probabilities sum to one however far the logits shift.

With `follow` a kind chooses nothing: scores and gates are of the given logits, the experts are those chosen before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.moe.decision import RoutingDecision
from moe_dist.moe.ledger import Choices
from moe_dist.moe.randomness import HASH, random_bits
from moe_dist.moe.selection import choose_experts


def softmax_topk(
    logits_TE: Tensor, config: MoEConfig, bias_E: Tensor | None = None, follow: Choices | None = None
) -> RoutingDecision:
    """The K experts of the highest softmax probability (also Switch, with K = 1 and the raw probability as gate).

    Gates are the probabilities of the chosen experts, or with `normalize_gates` these divided by their sum, which is
    the softmax of the chosen logits.

    Source: Shazeer et al. 2017, equation 2 without noise; Jiang et al. 2024 (Mixtral), section 2.1, for normalised
    gates; Fedus et al. 2022 (Switch), equations 1-2, for K = 1.
    """
    probability_TE = logits_TE.softmax(-1)
    expert_TK = choose_experts(logits_TE, probability_TE, bias_E, config, follow)
    if config.normalize_gates:
        gate_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
    else:
        gate_TK = probability_TE.gather(-1, expert_TK)
    return RoutingDecision(logits_TE, probability_TE, expert_TK, gate_TK * config.gate_scale)


def sigmoid_topk(
    logits_TE: Tensor, config: MoEConfig, bias_E: Tensor | None = None, follow: Choices | None = None
) -> RoutingDecision:
    """The K experts of the highest sigmoid score; each expert's score is its own, not a share.

    Gates are the scores of the chosen experts, or with `normalize_gates` these divided by their sum, computed as the
    softmax of their log-scores. The balance term sees scores divided by their sum over all experts.

    Source: DeepSeek-V3 (2024), equations 12-16 for scores, selection bias and gates, 17-20 for balance; raw scores as
    in Llama 4.
    """
    score_TE = logits_TE.sigmoid()
    log_score_TE = F.logsigmoid(logits_TE)
    expert_TK = choose_experts(logits_TE, score_TE, bias_E, config, follow)
    if config.normalize_gates:
        gate_TK = log_score_TE.gather(-1, expert_TK).softmax(-1)
    else:
        gate_TK = score_TE.gather(-1, expert_TK)
    return RoutingDecision(logits_TE, log_score_TE.softmax(-1), expert_TK, gate_TK * config.gate_scale)


def gshard_top2(
    logits_TE: Tensor, config: MoEConfig, uniform_T: Tensor | None, follow: Choices | None = None
) -> RoutingDecision:
    """Two experts a token, of which the second is asked with probability `2 * g2`; `g1 + g2 = 1`.

    Args:
        logits_TE: Raw scores.
        config: `top_k` is 2.
        uniform_T: A uniform number a token; None (in evaluation) always asks the second.
        follow: Choices that are taken as they are, with their answer on the second expert.

    Source: Lepikhin et al. 2021 (GShard), algorithm 1: gates are normalised over the two before the
    second is drawn, and the first keeps its weight when the second is left out. Its order of filling an expert, first
    choices before second ones, is `drop_policy: position_choice_major`.
    """
    probability_TE = logits_TE.softmax(-1)
    expert_TK = choose_experts(logits_TE, probability_TE, None, config, follow)
    gate_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
    asks_TK = None if follow is None else follow.asks_TK
    if follow is None and uniform_T is not None:
        second_T = uniform_T < 2 * gate_TK[:, 1].detach().double()
        asks_TK = torch.stack([torch.ones_like(second_T), second_T], dim=1)
    if asks_TK is not None:
        gate_TK = gate_TK * asks_TK
    return RoutingDecision(logits_TE, probability_TE, expert_TK, gate_TK * config.gate_scale, asks_TK)


def noisy_logits(clean_TE: Tensor, spread_TE: Tensor, normal_TE: Tensor) -> Tensor:
    """`clean + normal * softplus(spread)`. Source: Shazeer et al. 2017, equation 4."""
    return clean_TE + normal_TE.to(clean_TE.dtype) * F.softplus(spread_TE)


def expert_choice(logits_TE: Tensor, config: MoEConfig) -> RoutingDecision:
    """Every token offers itself to all experts; capacity then leaves each expert its most probable tokens.

    The decision asks for all E experts with the softmax probability as gate, and the plan drops by probability: what is
    left is the top C tokens of each expert in each sequence, with `C = ceil(capacity_factor * tokens * top_k / E)`.
    There is no `follow`: what can differ between two forwards is what the plan keeps.

    Source: Zhou et al. 2022 (expert choice), equations 1-2, with a sequence as the group of tokens.
    """
    probability_TE = logits_TE.softmax(-1)
    expert_TE = torch.arange(config.num_experts, device=logits_TE.device).expand_as(logits_TE).contiguous()
    return RoutingDecision(logits_TE, probability_TE, expert_TE, probability_TE * config.gate_scale)


def hash_routing(
    token_T: Tensor, layer: int, config: MoEConfig, dtype: torch.dtype, follow: Choices | None = None
) -> RoutingDecision:
    """K experts that depend on the token's id and the layer alone, each with the weight 1/K; nothing is learned.

    Expert e bids `random_bits(HASH, layer, token, e)` for a token and the K highest bids win, which are K different
    experts. The hash does not depend on the seed of the run.

    Source: Roller et al. 2021 (hash layers), section 3.1, random hash with K = 1 and no gate. Several experts are
    averaged here; the paper's MultiHash joins parts of experts instead.
    """
    expert_E = torch.arange(config.num_experts, device=token_T.device)
    bid_TE = random_bits(HASH, layer, token_T[:, None], expert_E)
    expert_TK = torch.sort(bid_TE, dim=-1, descending=True, stable=True).indices[:, : config.top_k]
    if follow is not None:
        expert_TK = follow.expert_TK
    gate_TK = torch.full(expert_TK.shape, config.gate_scale / config.top_k, dtype=dtype, device=token_T.device)
    logits_TE = torch.zeros(bid_TE.shape, dtype=dtype, device=token_T.device)
    probability_TE = logits_TE.scatter(1, expert_TK, 1 / config.top_k)
    return RoutingDecision(logits_TE, probability_TE, expert_TK, gate_TK)
