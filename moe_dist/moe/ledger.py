"""The routing of one layer as a value: recorded, cut and joined by global position, compared, and followed again.

Shape letters: T tokens, K experts per token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_dist.moe.decision import RoutingContext
    from moe_dist.moe.layer import MoERecord

    Forward = Callable[[Tensor, RoutingContext], tuple[Tensor, MoERecord | None]]


@dataclass(frozen=True)
class Choices:
    """What one layer chose for neighbouring tokens of a global batch.

    Attributes:
        first: Position of the first of the tokens in the global batch.
        expert_TK: Chosen experts, int64.
        kept_TK: Whether a choice had a row, after padding and drops.
        gate_TK: Gate weights before drops, fp32: to be compared; whoever follows the choices weighs them anew.
        asks_TK: False where a choice was not carried out; None where all were.
    """

    first: int
    expert_TK: Tensor
    kept_TK: Tensor
    gate_TK: Tensor
    asks_TK: Tensor | None = None

    @staticmethod
    def of(record: MoERecord, first: int) -> Choices:
        """The choices of a forward whose micro-batch begins at position `first`."""
        decision = record.decision
        gate_TK = decision.gate_TK.detach().float()
        return Choices(first + record.first, decision.expert_TK, record.plan.kept_TK, gate_TK, decision.asks_TK)

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.first + self.expert_TK.shape[0]

    def map(self, change: Callable[[Tensor], Tensor], first: int | None = None) -> Choices:
        """The same with every tensor changed, and perhaps another first position."""
        asks_TK = None if self.asks_TK is None else change(self.asks_TK)
        where = self.first if first is None else first
        return Choices(where, change(self.expert_TK), change(self.kept_TK), change(self.gate_TK), asks_TK)

    def part(self, first: int, count: int) -> Choices:
        """Those of `count` tokens from position `first`."""
        start = first - self.first
        assert start >= 0 and first + count <= self.end, (
            f"tokens {first} to {first + count} lie outside the choices of {self.first} to {self.end}"
        )
        return self.map(lambda tensor: tensor[start : start + count], first)


def join(parts: Sequence[Choices]) -> Choices:
    """Neighbouring parts as one, in order of position, whoever made them in whatever order.

    Raises:
        ValueError: A position is missing or there twice.
    """
    ordered = sorted(parts, key=lambda part: (part.first, part.end))
    for before, after in itertools.pairwise(ordered):
        if before.end != after.first:
            raise ValueError(f"after position {before.end} comes {after.first}")
    asks = [part.asks_TK for part in ordered if part.asks_TK is not None]
    return Choices(
        ordered[0].first,
        torch.cat([part.expert_TK for part in ordered]),
        torch.cat([part.kept_TK for part in ordered]),
        torch.cat([part.gate_TK for part in ordered]),
        torch.cat(asks) if asks else None,
    )


@dataclass(frozen=True)
class Difference:
    """How two layers' choices for the same tokens differ; the order of a token's experts is no difference.

    Attributes:
        experts: Tokens that ask for other experts.
        drops: Tokens with the same experts of which others were dropped.
        gate: Largest difference of a gate weight among tokens with the same experts.
        first: The first token that differs in experts or drops, counted from the first; None where none does.
    """

    experts: int
    drops: int
    gate: float
    first: int | None


def compare(a: Choices, b: Choices) -> Difference:
    """Compares two choices of equal shape."""
    expert_a, kept_a, gate_a = _by_expert(a)
    expert_b, kept_b, gate_b = _by_expert(b)
    moved_T = (expert_a != expert_b).any(-1)
    dropped_T = (kept_a != kept_b).any(-1) & ~moved_T
    gates = (gate_a - gate_b).abs()[~moved_T]
    differs = (moved_T | dropped_T).nonzero()
    return Difference(
        experts=int(moved_T.sum()),
        drops=int(dropped_T.sum()),
        gate=float(gates.max()) if gates.numel() else 0.0,
        first=int(differs[0]) if len(differs) else None,
    )


def asked_experts(expert_TK: Tensor, asks_TK: Tensor | None) -> Tensor:
    """A token's experts, -1 for a choice that was not carried out."""
    return expert_TK if asks_TK is None else expert_TK.masked_fill(~asks_TK, -1)


def _by_expert(choices: Choices) -> tuple[Tensor, Tensor, Tensor]:
    """Experts (-1 where not asked), kept and gates, with a token's choices in order of expert."""
    expert_TK, order_TK = asked_experts(choices.expert_TK, choices.asks_TK).sort(dim=-1, stable=True)
    return expert_TK, choices.kept_TK.gather(-1, order_TK), choices.gate_TK.gather(-1, order_TK)


def decide_once(
    run: Forward, context: RoutingContext, block: int
) -> Callable[[Tensor], tuple[Tensor, MoERecord | None]]:
    """A forward that may be run again for its gradient: its first call routes, every later one follows the first.

    For `torch.utils.checkpoint(..., use_reentrant=False)`, which returns what the first call returned, so that the
    plan's counts are there once. Whatever moved in between (a selection bias, the last bit of a hidden state), the
    recomputed rows are those that the first call sent. The balance terms take the demand that they took first, so that
    a global one asks the other ranks once.

    Args:
        run: Runs the layer or its block on hidden states and a context.
        context: As for the first call.
        block: Number of the block.
    """
    first: list[RoutingContext] = []

    def once(x: Tensor) -> tuple[Tensor, MoERecord | None]:
        out, record = run(x, first[0] if first else context)
        if record is not None and not first:
            replay = {**(context.replay or {}), block: Choices.of(record, context.first_position)}
            first.append(replace(context, replay=replay, taken_demand={block: record.balance_demand_XE}))
        return out, record

    return once
