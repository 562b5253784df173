"""The routing plan: which (token, choice) becomes which row of which expert. Pure integers, made once a forward.

Shape letters: B sequences, S tokens of a sequence, T = B*S tokens, K experts per token, E experts, N rows kept.

The rows of a plan are sorted by expert, and within an expert by token, so that the rows of one expert (and of one rank,
as ranks own neighbouring experts) lie together:

    expert_TK      token 0: [2, 0]   token 1: [0, 1]   token 2: [2, 1]
    slots (t*K+k)  0->2  1->0         2->0  3->1         4->2  5->1
    slot_N         1 2 | 3 5 | 0 4            rows 0 1 of expert 0, 2 3 of expert 1, 4 5 of expert 2
    row_TK         [4, 0]            [1, 2]            [5, 3]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config import MoEConfig


@dataclass(frozen=True)
class RoutingPlan:
    """A routing decision after padding and capacity, as indices.

    Attributes:
        slot_N: Slot `t*K + k` of every row, int64.
        row_TK: Row of every slot, int64; 0 where the slot has none (see `kept_TK`).
        kept_TK: Whether the slot has a row: its token is counted, its choice is carried out and its expert had room.
        demand_E: Slots of counted tokens that asked for each expert, before drops, int64.
        served_E: Rows of each expert, after drops, int64.
    """

    slot_N: Tensor
    row_TK: Tensor
    kept_TK: Tensor
    demand_E: Tensor
    served_E: Tensor

    @property
    def token_N(self) -> Tensor:
        """Token of every row."""
        return self.slot_N // self.row_TK.shape[1]

    @property
    def keeps_all(self) -> bool:
        """Whether every slot has a row."""
        return self.slot_N.numel() == self.row_TK.numel()


@dataclass(frozen=True)
class Capacity:
    """How many rows an expert takes from one sequence, and who stays outside when more ask.

    Attributes:
        factor: Multiple of an even share; `ceil(factor * counted tokens * K / E)` rows.
        minimum: At least so many rows.
        policy: Who is dropped: with `probability` the least probable; with `position_token_major` the latest, all
            choices of a token side by side; with `position_choice_major` the latest where every first choice comes
            before any second one (Lepikhin et al. 2021, GShard, algorithm 1).
        share: Experts per token that an even share is counted for, where a token asks for more (expert choice); None
            takes the K of the choices.
    """

    factor: float
    minimum: int
    policy: str
    share: int | None = None

    @staticmethod
    def of(config: MoEConfig, training: bool) -> Capacity | None:
        """The capacity that a config asks for, or None where nothing is dropped."""
        factor = config.capacity_factor if training else config.capacity_factor_eval
        return None if factor is None else Capacity(factor, config.min_capacity, config.drop_policy, config.top_k)

    def rows(self, tokens_B: Tensor, top_k: int, num_experts: int) -> Tensor:
        """Rows per expert for sequences of `tokens_B` counted tokens, int64 [B]. Exact for integer-valued products."""
        share = tokens_B.double() * (self.factor * (self.share or top_k)) / num_experts
        return torch.ceil(share - 1e-9).long().clamp(min=self.minimum)

    def priority(self, probability_TK: Tensor) -> Tensor | None:
        """What goes first in a queue, by slot; None where slots stand in the order of tokens."""
        match self.policy:
            case "probability":
                return probability_TK.reshape(-1)
            case "position_choice_major":
                tokens, top_k = probability_TK.shape
                return -torch.arange(top_k, device=probability_TK.device).repeat(tokens)
        return None


def make_plan(
    expert_TK: Tensor,
    probability_TK: Tensor,
    counted_BS: Tensor | None,
    shape: tuple[int, int, int],
    capacity: Capacity | None,
    asks_TK: Tensor | None = None,
) -> RoutingPlan:
    """Turns choices into rows.

    Args:
        expert_TK: Chosen experts, int64.
        probability_TK: Their router probabilities; only their order matters.
        counted_BS: False for padding, which takes no row and no capacity; None where every token counts.
        shape: (B, S, E).
        capacity: None drops nothing.
        asks_TK: False for a choice that is not carried out: it is no demand and takes no row; None where all are.
    """
    batch, length, num_experts = shape
    expert_slots = expert_TK.reshape(-1)
    top_k = expert_TK.shape[1]
    kept_slots = _asking_slots(expert_TK, counted_BS, asks_TK)
    tokens_B = torch.full((batch,), length, device=expert_TK.device)
    if counted_BS is not None:
        tokens_B = counted_BS.sum(1)
    demand_E = torch.bincount(expert_slots[kept_slots], minlength=num_experts)
    served_E = demand_E
    if capacity is not None:
        limit_B = capacity.rows(tokens_B, top_k, num_experts)
        sequence_slots = torch.arange(batch, device=expert_TK.device).repeat_interleave(length * top_k)
        queue = sequence_slots * num_experts + expert_slots
        place = _place_in_queue(queue, kept_slots, capacity.priority(probability_TK))
        kept_slots = kept_slots & (place < limit_B[sequence_slots])
        served_E = torch.bincount(expert_slots[kept_slots], minlength=num_experts)
    return _rows(expert_TK, kept_slots, demand_E, served_E)


def follow_plan(
    expert_TK: Tensor, kept_TK: Tensor, counted_BS: Tensor | None, num_experts: int, asks_TK: Tensor | None = None
) -> RoutingPlan:
    """The plan of choices of which it is known already which were kept; arguments as in `make_plan`."""
    asking_slots = _asking_slots(expert_TK, counted_BS, asks_TK)
    kept_slots = asking_slots & kept_TK.reshape(-1)
    demand_E, served_E = (
        torch.bincount(expert_TK.reshape(-1)[slots], minlength=num_experts) for slots in (asking_slots, kept_slots)
    )
    return _rows(expert_TK, kept_slots, demand_E, served_E)


def _asking_slots(expert_TK: Tensor, counted_BS: Tensor | None, asks_TK: Tensor | None) -> Tensor:
    """Whether each slot is a demand: its token is counted and its choice carried out."""
    asking_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    if counted_BS is not None:
        asking_TK = asking_TK & counted_BS.reshape(-1, 1)
    return (asking_TK if asks_TK is None else asking_TK & asks_TK).reshape(-1)


def _rows(expert_TK: Tensor, kept_slots: Tensor, demand_E: Tensor, served_E: Tensor) -> RoutingPlan:
    num_experts = demand_E.numel()
    # Slots without a row sort behind the last expert; the sort is stable, so that rows keep token order.
    key = torch.where(kept_slots, expert_TK.reshape(-1), num_experts)
    slot_N = torch.sort(key, stable=True).indices[: int(served_E.sum())]
    row_slots = torch.zeros_like(key)
    row_slots[slot_N] = torch.arange(slot_N.numel(), device=key.device)
    return RoutingPlan(slot_N, row_slots.view_as(expert_TK), kept_slots.view_as(expert_TK), demand_E, served_E)


def _place_in_queue(queue: Tensor, waits: Tensor, priority: Tensor | None) -> Tensor:
    """Place of every slot in its queue, from 0: higher priority first, ties and no priority in slot order.

    Slots that do not wait stand behind all that do.
    """
    order = torch.arange(queue.numel(), device=queue.device)
    if priority is not None:
        order = torch.sort(priority.detach(), descending=True, stable=True).indices
    order = order[torch.sort((~waits[order]).long(), stable=True).indices]
    order = order[torch.sort(queue[order], stable=True).indices]
    length_Q = torch.bincount(queue)
    start_Q = length_Q.cumsum(0) - length_Q
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - start_Q[queue[order]]
    return place
