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
        slot_N: Slot `t*K + k` of every row, int64; -1 for an empty row (`pad_to_capacity`).
        row_TK: Row of every slot, int64; 0 where the slot has none (see `kept_TK`).
        kept_TK: Whether the slot has a row: its token is counted, its choice is carried out and its expert had room.
        demand_E: Slots of counted tokens that asked for each expert, before drops, int64.
        served_E: Rows of each expert, after drops, int64; empty ones are not counted.
        rows_each: Rows of every expert where they are padded to its capacity, as below; None where there are no empty
            rows.

                served 2, 0, 1 of 2 rows each    slot_N   1 2 | -1 -1 | 0 -1
    """

    slot_N: Tensor
    row_TK: Tensor
    kept_TK: Tensor
    demand_E: Tensor
    served_E: Tensor
    rows_each: int | None = None

    @property
    def token_N(self) -> Tensor:
        """Token of every row; of an empty row the first, with the weight 0."""
        token_N = self.slot_N // self.row_TK.shape[1]
        return token_N if self.rows_each is None else token_N.clamp(min=0)

    @property
    def rows_E(self) -> Tensor:
        """Rows of each expert, empty ones too, int64."""
        return self.served_E if self.rows_each is None else torch.full_like(self.served_E, self.rows_each)

    @property
    def keeps_all(self) -> bool:
        """Whether every slot has a row, and every row a slot."""
        return self.rows_each is None and self.slot_N.numel() == self.row_TK.numel()

    def part(self, first: int, last: int) -> RoutingPlan:
        """The plan of the tokens from `first` up to `last`, counted from 0; its rows keep their order.

        It does not know which of the choices without a row were demands: its `demand_E` is what it serves.
        """
        assert self.rows_each is None, "rows padded to a capacity are those of all tokens together"
        experts, top_k = self.served_E.numel(), self.row_TK.shape[1]
        here_N = (self.slot_N >= first * top_k) & (self.slot_N < last * top_k)
        slot_P = self.slot_N[here_N] - first * top_k
        expert_N = torch.arange(experts, device=here_N.device).repeat_interleave(self.served_E)
        served_E = torch.bincount(expert_N[here_N], minlength=experts)
        row_TK = torch.zeros_like(self.row_TK[first:last])
        row_TK.view(-1)[slot_P] = torch.arange(slot_P.numel(), device=slot_P.device)
        return RoutingPlan(slot_P, row_TK, self.kept_TK[first:last], served_E, served_E)

    def of_rows(self, value_TK: Tensor) -> Tensor:
        """The value of every row's slot, [N]; 0 for an empty row."""
        if self.rows_each is None:
            return value_TK.reshape(-1).index_select(0, self.slot_N)
        value_N = value_TK.reshape(-1).index_select(0, self.slot_N.clamp(min=0))
        return value_N.masked_fill(self.slot_N < 0, 0)

    def to_slots(self, value_N: Tensor) -> Tensor:
        """The value of every slot's row, [T, K]; 0 for a slot without one."""
        slot_N = self.slot_N
        if self.rows_each is not None:
            slot_N, value_N = slot_N[slot_N >= 0], value_N[slot_N >= 0]
        return value_N.new_zeros(self.row_TK.numel()).index_copy_(0, slot_N, value_N).view_as(self.row_TK)


@dataclass(frozen=True)
class Capacity:
    """How many rows an expert takes from a group of tokens, and who stays outside when more ask.

    Attributes:
        factor: Multiple of an even share; `ceil(factor * counted tokens * K / E)` rows.
        minimum: At least so many rows.
        policy: Who is dropped: with `probability` the least probable; with `position_token_major` the latest, all
            choices of a token side by side; with `position_choice_major` the latest where every first choice comes
            before any second one (Lepikhin et al. 2021, GShard, algorithm 1).
        share: Experts per token that an even share is counted for, where a token asks for more (expert choice); None
            takes the K of the choices.
        by_rank: The group is all tokens of the forward, in place of each sequence by itself.
        pad: Every expert has as many rows as fit, empty ones too.
    """

    factor: float
    minimum: int
    policy: str
    share: int | None = None
    by_rank: bool = False
    pad: bool = False

    @staticmethod
    def of(config: MoEConfig, training: bool) -> Capacity | None:
        """The capacity that a config asks for, or None where nothing is dropped."""
        factor = config.capacity_factor if training else config.capacity_factor_eval
        if factor is None:
            return None
        by_rank = config.capacity_group == "rank"
        return Capacity(factor, config.min_capacity, config.drop_policy, config.top_k, by_rank, config.pad_to_capacity)

    def groups(self, batch: int, length: int, device: torch.device) -> Tensor:
        """The capacity group of every token, int64 [T]."""
        group_B = torch.arange(batch, device=device)
        return (group_B * 0 if self.by_rank else group_B).repeat_interleave(length)

    def rows(self, tokens_B: Tensor, top_k: int, num_experts: int) -> Tensor:
        """Rows per expert for groups of `tokens_B` counted tokens, int64 [B]. Exact for integer-valued products."""
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
    top_k = expert_TK.shape[1]
    if counted_BS is None:
        counted_BS = torch.ones(batch, length, dtype=torch.bool, device=expert_TK.device)
    kept_slots = _asking_slots(expert_TK, counted_BS, asks_TK)
    demand_E = torch.bincount(expert_TK.reshape(-1)[kept_slots], minlength=num_experts)
    if capacity is None:
        return _rows(expert_TK, kept_slots, demand_E, demand_E)
    group_T = capacity.groups(batch, length, expert_TK.device)
    limit_B = _limits(capacity, counted_BS, (top_k, num_experts))
    group_slots = group_T.repeat_interleave(top_k)
    queue = group_slots * num_experts + expert_TK.reshape(-1)
    place = _place_in_queue(queue, kept_slots, capacity.priority(probability_TK))
    kept_slots = kept_slots & (place < limit_B[group_slots])
    served_E = torch.bincount(expert_TK.reshape(-1)[kept_slots], minlength=num_experts)
    return _rows(expert_TK, kept_slots, demand_E, served_E, _rows_each(capacity, shape, expert_TK))


def follow_plan(
    expert_TK: Tensor,
    kept_TK: Tensor,
    counted_BS: Tensor | None,
    shape: tuple[int, int, int],
    capacity: Capacity | None,
    asks_TK: Tensor | None = None,
) -> RoutingPlan:
    """The plan of choices of which it is known already which were kept; other arguments as in `make_plan`."""
    asking_slots = _asking_slots(expert_TK, counted_BS, asks_TK)
    kept_slots = asking_slots & kept_TK.reshape(-1)
    demand_E, served_E = (
        torch.bincount(expert_TK.reshape(-1)[slots], minlength=shape[2]) for slots in (asking_slots, kept_slots)
    )
    return _rows(expert_TK, kept_slots, demand_E, served_E, _rows_each(capacity, shape, expert_TK))


def demand_of(expert_TK: Tensor, counted_T: Tensor | None, asks_TK: Tensor | None, num_experts: int) -> Tensor:
    """Assignments to each expert before drops, int64 [E]."""
    return torch.bincount(expert_TK.reshape(-1)[_asking_slots(expert_TK, counted_T, asks_TK)], minlength=num_experts)


def _asking_slots(expert_TK: Tensor, counted_BS: Tensor | None, asks_TK: Tensor | None) -> Tensor:
    """Whether each slot is a demand: its token is counted and its choice carried out."""
    asking_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    if counted_BS is not None:
        asking_TK = asking_TK & counted_BS.reshape(-1, 1)
    return (asking_TK if asks_TK is None else asking_TK & asks_TK).reshape(-1)


def _limits(capacity: Capacity, counted_BS: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows that an expert takes of each group, int64; `shape` is (K, E)."""
    tokens_B = counted_BS.sum(1)
    return capacity.rows(tokens_B.sum(0, keepdim=True) if capacity.by_rank else tokens_B, *shape)


def _rows_each(capacity: Capacity | None, shape: tuple[int, int, int], expert_TK: Tensor) -> int | None:
    """Rows of every expert where they are padded; the shape of the batch alone decides, whatever is padding in it."""
    if capacity is None or not capacity.pad:
        return None
    if not shape[0]:
        return 0  # of an empty batch not even `min_capacity` rows: there is no token that an empty row could read
    everybody = torch.ones(shape[:2], dtype=torch.bool, device=expert_TK.device)
    return int(_limits(capacity, everybody, (expert_TK.shape[1], shape[2])).sum())


def _rows(
    expert_TK: Tensor, kept_slots: Tensor, demand_E: Tensor, served_E: Tensor, rows_each: int | None = None
) -> RoutingPlan:
    num_experts = demand_E.numel()
    # Slots without a row sort behind the last expert; the sort is stable, so that rows keep token order.
    key = torch.where(kept_slots, expert_TK.reshape(-1), num_experts)
    slot_N = torch.sort(key, stable=True).indices[: int(served_E.sum())]
    row_N = torch.arange(slot_N.numel(), device=key.device)
    if rows_each is not None:
        first_E = torch.arange(num_experts, device=key.device) * rows_each - (served_E.cumsum(0) - served_E)
        row_N = row_N + first_E[key[slot_N]]
    row_slots = torch.zeros_like(key)
    row_slots[slot_N] = row_N
    if rows_each is not None:
        slot_N = slot_N.new_full((num_experts * rows_each,), -1).index_copy_(0, row_N, slot_N)
    row_TK, kept_TK = row_slots.view_as(expert_TK), kept_slots.view_as(expert_TK)
    return RoutingPlan(slot_N, row_TK, kept_TK, demand_E, served_E, rows_each)


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
