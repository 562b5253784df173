"""The oracle's routers: one token at a time, in plain Python where numbers are whole. Slow, obvious, never optimised.

Shares no code with `router.py`, `router_kinds.py`, `selection.py` and `randomness.py`, which it judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config import MoEConfig


@dataclass(frozen=True)
class Routed:
    """What one token was told.

    Attributes:
        logits_E: Raw scores.
        probability_E: Shares over all experts.
        chosen: Experts, best first; only those that are really asked.
        gates: Their weights.
    """

    logits_E: Tensor
    probability_E: Tensor
    chosen: list[int]
    gates: list[Tensor]


@dataclass(frozen=True)
class Occasion:
    """When and where a layer is run: all that its random numbers and hashes may depend on.

    Attributes:
        tokens: Token ids by sequence.
        seed: Of the run.
        step: Updates made before.
        layer: Number of the block.
        first_row: Place of the first sequence in the global batch.
    """

    tokens: list[list[int]]
    seed: int = 0
    step: int = 0
    layer: int = 0
    first_row: int = 0

    def position(self, b: int, s: int) -> int:
        """Global position of a token."""
        return (self.first_row + b) * len(self.tokens[b]) + s


@dataclass(frozen=True)
class Place:
    """One token of an occasion, in training or not."""

    occasion: Occasion
    b: int
    s: int
    training: bool

    def uniform(self, purpose: int, *keys: int) -> float:
        """A number in [0, 1) for this token."""
        when = self.occasion
        name = (when.seed, when.step, purpose, when.layer, when.position(self.b, self.s), *keys)
        return (_bits(*name) >> 11) / 2**53


def route_token(weights: dict[str, Tensor], x_D: Tensor, place: Place, config: MoEConfig) -> Routed:
    """Routes one token.

    Args:
        weights: `router` [E, D]; with a bias `router_bias` [E]; with noise `noise` [E, D]; with a selection bias
            `selection_bias` [E].
        x_D: The hidden state.
        place: Which token it is.
        config: The layer's configuration.
    """
    if config.router == "hash":
        return _hashed(x_D, place, config)
    if config.input_jitter and place.training:
        spread = [2 * place.uniform(1, d) - 1 for d in range(len(x_D))]
        x_D = torch.stack([x_D[d] * (1 + config.input_jitter * spread[d]) for d in range(len(x_D))])
    logits = [(weights["router"][e] * x_D).sum() for e in range(config.num_experts)]
    if config.router_bias:
        logits = [logit + weights["router_bias"][e] for e, logit in enumerate(logits)]
    if config.router == "noisy_topk" and place.training:
        for e in range(config.num_experts):
            spread_e = torch.log(1 + torch.exp((weights["noise"][e] * x_D).sum()))
            u, v = place.uniform(2, e, 0), place.uniform(2, e, 1)
            logits[e] = logits[e] + math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v) * spread_e
    logits_E = torch.stack(logits)
    if config.router == "sigmoid_topk":
        score_E = 1 / (1 + torch.exp(-logits_E))
        probability_E = score_E / score_E.sum()
    else:
        score_E = probability_E = torch.exp(logits_E) / torch.exp(logits_E).sum()
    if config.router == "expert_choice":
        return Routed(logits_E, probability_E, list(range(config.num_experts)), list(probability_E * config.gate_scale))
    chosen = _choose(score_E, weights.get("selection_bias"), config)
    gates = [score_E[e] for e in chosen]
    if config.normalize_gates:
        gates = [gate / sum(gates) for gate in gates]
    if config.router == "gshard" and place.training and not place.uniform(3) < 2 * gates[1].detach().item():
        chosen, gates = chosen[:1], gates[:1]
    return Routed(logits_E, probability_E, chosen, [gate * config.gate_scale for gate in gates])


def _choose(score_E: Tensor, bias_E: Tensor | None, config: MoEConfig) -> list[int]:
    scores = score_E.tolist()
    if bias_E is not None:
        scores = [score + bias for score, bias in zip(scores, bias_E.tolist(), strict=True)]
    size = config.num_experts // config.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]

    def score_of(group: range) -> float:
        return sum(sorted((scores[e] for e in group), reverse=True)[: config.group_score_experts])

    open_groups = sorted(groups, key=lambda group: (-score_of(group), group[0]))[: config.groups_per_token]
    open_experts = [e for group in open_groups for e in group]
    return sorted(open_experts, key=lambda e: (-scores[e], e))[: config.top_k]


def _hashed(x_D: Tensor, place: Place, config: MoEConfig) -> Routed:
    token = place.occasion.tokens[place.b][place.s]
    bids = [_bits(4, place.occasion.layer, token, e) for e in range(config.num_experts)]
    signed = [bid - 2**64 if bid >= 2**63 else bid for bid in bids]
    chosen = sorted(range(config.num_experts), key=lambda e: -signed[e])[: config.top_k]
    share = x_D.new_tensor(1 / config.top_k)
    probability_E = torch.stack([share if e in chosen else share * 0 for e in range(config.num_experts)])
    return Routed(torch.zeros_like(probability_E), probability_E, chosen, [share * config.gate_scale] * config.top_k)


def _bits(*keys: int) -> int:
    """Stirs whole numbers into 64 bits as SplitMix64 does."""
    state = 0
    for key in keys:
        state = (state + (key + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state = state ^ (state >> 31)
    return state
