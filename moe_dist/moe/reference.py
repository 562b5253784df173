"""The oracle: a mixture-of-experts layer as a loop over tokens. Slow, obvious, shipped, never optimised.

It shares no code with the layer it judges: it routes (`reference_routing.py`), drops, weighs and sums by itself, from
the same weights.
"""

from __future__ import annotations

import math

import torch
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
        weights: `router` [E, D], `gate_up` [E, 2F, D] (or `up` [E, F, D]), `down` [E, F, D]; where there are any also
            `router_bias` [E], `noise` [E, D], `selection_bias` [E], `latent_in` [Z, D], `latent_out` [D, Z], and
            `gate_up_bias` [E, 2F] or `up_bias` [E, F], with `down_bias` [E, D].
        x_BSD: Input.
        counted_BS: False for padding.
        config: The layer's configuration.
        training: Which capacity factor applies, and whether random numbers are drawn.
        occasion: Token ids and what names random numbers; None takes token 0 everywhere, seed 0, step 0.

    Returns:
        The output [B, S, D] and `balance_sum`, `group_balance_sum`, `z_sum` (scalars), `demand_E`, `served_E` (int64).
    """
    batch, length, _ = x_BSD.shape
    occasion = occasion or Occasion([[0] * length] * batch)
    demand_E = torch.zeros(config.num_experts, dtype=torch.int64)
    served_E = torch.zeros(config.num_experts, dtype=torch.int64)
    z_total = x_BSD.new_zeros(())
    outputs, sequences = [], []
    for b in range(batch):
        routed = [route_token(weights, x_BSD[b, s], Place(occasion, b, s, training), config) for s in range(length)]
        sequences.append((routed, [s for s in range(length) if counted_BS[b, s]]))
    kept_by_sequence = _keep_all(sequences, config, training)
    for b, (routed, counted) in enumerate(sequences):
        kept = kept_by_sequence[b]
        for s in counted:
            z_total = z_total + torch.logsumexp(routed[s].logits_E, 0) ** 2
            for e in routed[s].chosen:
                demand_E[e] += 1
        for _, e in kept:
            served_E[e] += 1
        outputs += [_token_output(weights, x_BSD[b, s], routed[s], s, kept, config) for s in range(length)]
    singles = [[e] for e in range(config.num_experts)]
    size = config.num_experts // config.num_groups
    groups = [list(range(first, first + size)) for first in range(0, config.num_experts, size)]
    stats = {"z_sum": z_total, "demand_E": demand_E, "served_E": served_E}
    stats["balance_sum"] = _balance(sequences, singles, config, x_BSD)
    stats["group_balance_sum"] = _balance(sequences, groups, config, x_BSD)
    return torch.stack(outputs).view_as(x_BSD), stats


def _keep_all(
    sequences: list[tuple[list[Routed], list[int]]], config: MoEConfig, training: bool
) -> list[set[tuple[int, int]]]:
    """The (token, expert) pairs that have room, by sequence; capacity is counted in each, or in all together."""
    if config.capacity_group == "sequence":
        return [_keep(routed, counted, config, training) for routed, counted in sequences]
    length = len(sequences[0][0]) if sequences else 0
    everything = [token for routed, _ in sequences for token in routed]
    places = [b * length + s for b, (_, counted) in enumerate(sequences) for s in counted]
    kept = _keep(everything, places, config, training)
    return [{(p - b * length, e) for p, e in kept if p // length == b} for b in range(len(sequences))]


def _keep(routed: list[Routed], counted: list[int], config: MoEConfig, training: bool) -> set[tuple[int, int]]:
    """The (token, expert) pairs of one capacity group that have room."""
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
    inside_Z = weights["latent_in"] @ x_D if "latent_in" in weights else x_D
    out_Z = torch.zeros_like(inside_Z)
    scale = sum(routed.gates) / sum(routed.gates[i] for i in here) if here and config.renormalize_after_drop else 1.0
    for i in here:
        gate = scale * routed.gates[i]
        if config.weigh == "input":
            out_Z = out_Z + _expert(weights, gate * inside_Z, routed.chosen[i], config)
        else:
            out_Z = out_Z + gate * _expert(weights, inside_Z, routed.chosen[i], config)
    return weights["latent_out"] @ out_Z if "latent_out" in weights else out_Z


def _expert(weights: dict[str, Tensor], x_D: Tensor, e: int, config: MoEConfig) -> Tensor:
    name = "gate_up" if "gate_up" in weights else "up"
    first_H = weights[name][e] @ x_D
    if config.expert_bias:
        first_H = first_H + weights[f"{name}_bias"][e]
    out_D = _activated(first_H, config.activation) @ weights["down"][e]
    return out_D + weights["down_bias"][e] if config.expert_bias else out_D


def _activated(first_H: Tensor, activation: str) -> Tensor:
    """[F], from the first product."""
    if activation == "relu":
        return torch.where(first_H > 0, first_H, 0)
    if activation == "squared_relu":
        return torch.where(first_H > 0, first_H**2, 0)
    if activation == "gelu":
        return first_H * 0.5 * (1 + torch.erf(first_H / math.sqrt(2)))
    gate_F, up_F = first_H.chunk(2)
    if activation == "swiglu":
        return gate_F / (1 + torch.exp(-gate_F)) * up_F
    if activation == "geglu":
        return gate_F * 0.5 * (1 + torch.erf(gate_F / math.sqrt(2))) * up_F
    gate_F, up_F = gate_F.clamp(max=7.0), up_F.clamp(-7.0, 7.0)
    return gate_F / (1 + torch.exp(-1.702 * gate_F)) * (up_F + 1)


def _balance(
    sequences: list[tuple[list[Routed], list[int]]], groups: list[list[int]], config: MoEConfig, like: Tensor
) -> Tensor:
    """Tokens * (groups of experts) * sum_j f_j P_j, for each sequence or for all that are here together.

    All that are here are the micro-batch of a rank; where the whole global batch is here, they are that.
    """
    sets = sequences
    if config.balance_scope != "sequence":
        everything = [routed[s] for routed, counted in sequences for s in counted]
        sets = [(everything, list(range(len(everything))))]
    total = like.new_zeros(())
    for routed, counted in sets:
        asked = sum(len(routed[s].chosen) for s in counted)
        for group in groups:
            fraction = sum(e in routed[s].chosen for s in counted for e in group) / max(asked, 1)
            for s in counted:
                for e in group:
                    total = total + len(groups) * fraction * routed[s].probability_E[e]
    return total
