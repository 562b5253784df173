"""The oracle: a mixture-of-experts layer as a loop over tokens. Slow, obvious, shipped, never optimised.

It shares no code with the layer it judges: it routes (`reference_routing.py`), drops, weighs and sums by itself, from
the same weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.moe.reference_routing import Occasion, Place, Routed, route_token


def moe_reference(
    weights: dict[str, Tensor],
    x_BSD: Tensor,
    counted_BS: Tensor,
    config: MoEConfig,
    training: bool = True,
    occasion: Occasion | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the routed part of a layer (no shared expert) token by token.

    Args:
        weights: `router` [E, D], `gate_up` [E, D, 2F], `down` [E, F, D]; where the router has them also `router_bias`
            [E], `noise` [E, D] and `selection_bias` [E].
        x_BSD: Input.
        counted_BS: False for padding.
        config: The layer's configuration.
        training: Which capacity factor applies, and whether random numbers are drawn.
        occasion: Token ids and what names random numbers; None takes token 0 everywhere, seed 0, step 0.

    Returns:
        The output [B, S, D] and `balance_sum`, `z_sum` (scalars), `demand_E`, `served_E` (int64).
    """
    batch, length, _ = x_BSD.shape
    occasion = occasion or Occasion([[0] * length] * batch)
    demand_E = torch.zeros(config.num_experts, dtype=torch.int64)
    served_E = torch.zeros(config.num_experts, dtype=torch.int64)
    z_total = x_BSD.new_zeros(())
    outputs, sequences = [], []
    for b in range(batch):
        routed = [route_token(weights, x_BSD[b, s], Place(occasion, b, s, training), config) for s in range(length)]
        counted = [s for s in range(length) if counted_BS[b, s]]
        kept = _keep(routed, counted, config, training)
        for s in counted:
            z_total = z_total + torch.logsumexp(routed[s].logits_E, 0) ** 2
            for e in routed[s].chosen:
                demand_E[e] += 1
        for _, e in kept:
            served_E[e] += 1
        outputs += [_token_output(weights, x_BSD[b, s], routed[s], s, kept, config) for s in range(length)]
        sequences.append((routed, counted))
    balance_sum = _balance(sequences, config, x_BSD)
    stats = {"balance_sum": balance_sum, "z_sum": z_total, "demand_E": demand_E, "served_E": served_E}
    return torch.stack(outputs).view_as(x_BSD), stats


def _keep(routed: list[Routed], counted: list[int], config: MoEConfig, training: bool) -> set[tuple[int, int]]:
    """The (token, expert) pairs of one sequence that have room."""
    factor = config.capacity_factor if training else config.capacity_factor_eval
    pairs = [(s, e) for s in counted for e in routed[s].chosen]
    if factor is None:
        return set(pairs)
    # The exact rational value, so that 1.25 * 16 * 2 / 8 is 5 and not a rounding above it.
    limit = max(config.min_capacity, math.ceil(factor * len(counted) * config.top_k / config.num_experts - 1e-9))
    kept: set[tuple[int, int]] = set()
    for expert in range(config.num_experts):
        queue = [s for s, e in pairs if e == expert]
        if config.drop_policy == "probability":
            queue.sort(key=lambda s: (-routed[s].probability_E[expert].item(), s))
        if config.drop_policy == "position_choice_major":
            queue.sort(key=lambda s: (routed[s].chosen.index(expert), s))
        kept.update((s, expert) for s in queue[:limit])
    return kept


def _token_output(
    weights: dict[str, Tensor], x_D: Tensor, routed: Routed, s: int, kept: set[tuple[int, int]], config: MoEConfig
) -> Tensor:
    here = [i for i, e in enumerate(routed.chosen) if (s, e) in kept]
    out_D = torch.zeros_like(x_D)
    if not here:
        return out_D
    scale = sum(routed.gates) / sum(routed.gates[i] for i in here) if config.renormalize_after_drop else 1.0
    for i in here:
        gate_F, up_F = (x_D @ weights["gate_up"][routed.chosen[i]]).chunk(2)
        out_D = out_D + scale * routed.gates[i] * ((F.silu(gate_F) * up_F) @ weights["down"][routed.chosen[i]])
    return out_D


def _balance(sequences: list[tuple[list[Routed], list[int]]], config: MoEConfig, like: Tensor) -> Tensor:
    """Tokens * E * sum_i f_i P_i, for each sequence or for all of them together."""
    groups = sequences
    if config.balance_scope == "global":
        everything = [routed[s] for routed, counted in sequences for s in counted]
        groups = [(everything, list(range(len(everything))))]
    total = like.new_zeros(())
    for routed, counted in groups:
        asked = sum(len(routed[s].chosen) for s in counted)
        for e in range(config.num_experts):
            fraction = sum(e in routed[s].chosen for s in counted) / max(asked, 1)
            for s in counted:
                total = total + config.num_experts * fraction * routed[s].probability_E[e]
    return total
