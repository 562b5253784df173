"""Bytes that a rank sends to the *other* ranks of its expert group in one forward pass: closed formulas of counts.

What stays on the rank is not counted. The backward pass sends the rows of both ways once more in the other direction,
and no counts or choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from torch import Tensor

INTEGER_BYTES = 8  # counts and choices travel as int64


@dataclass(frozen=True)
class WireBytes:
    """Bytes sent on the way to the experts and on the way back."""

    dispatch: int
    combine: int

    @property
    def total(self) -> int:
        """Both ways."""
        return self.dispatch + self.combine


@dataclass(frozen=True)
class TwoLevelBytes:
    """Bytes sent to ranks of other nodes, and to other ranks of the own node."""

    between: WireBytes
    inside: WireBytes

    @property
    def total(self) -> int:
        """Both levels, both ways."""
        return self.between.total + self.inside.total


@dataclass(frozen=True)
class ItemBytes:
    """Sizes of what travels.

    Attributes:
        token: A row of D values on the way to the experts, in the type of the layer's input.
        result: A row on the way back, in the type of the experts' output (narrower under autocast).
        gate: One gate weight.
    """

    token: int
    result: int
    gate: int

    @staticmethod
    def of(x_TD: Tensor, y_RD: Tensor, gate_TK: Tensor) -> ItemBytes:
        """The sizes of a layer's own tensors."""
        width = x_TD.shape[1]
        return ItemBytes(width * x_TD.element_size(), width * y_RD.element_size(), gate_TK.element_size())


@dataclass(frozen=True)
class Traffic:
    """What one rank (`place` in its group) exchanges with every rank of the group, itself included.

    Attributes:
        place: This rank's position in the group.
        tokens_out: Rows of width D to each rank on the way to the experts.
        tokens_in: The same from each rank; so many go back to it.
        choices_out: Kept (token, expert) choices whose expert lives at each rank.
        choices_in: The same from each rank.
    """

    place: int
    tokens_out: list[int]
    tokens_in: list[int]
    choices_out: list[int]
    choices_in: list[int]


def plain_bytes(traffic: Traffic, experts_by_rank: list[int], item: ItemBytes) -> WireBytes:
    """All-to-all of rows: a count for every expert elsewhere, a row for every choice elsewhere, as many back."""
    counts = _elsewhere(experts_by_rank, traffic.place)
    dispatch = INTEGER_BYTES * counts + item.token * _elsewhere(traffic.choices_out, traffic.place)
    return WireBytes(dispatch, item.result * _elsewhere(traffic.choices_in, traffic.place))


def token_bytes(traffic: Traffic, item: ItemBytes) -> WireBytes:
    """All-gather and de-duplicated: a row for every token that crosses, and for every choice elsewhere an integer and
    a gate weight; two counts for every other rank."""
    counts = 2 * (len(traffic.tokens_out) - 1)
    choices = _elsewhere(traffic.choices_out, traffic.place)
    rows = item.token * _elsewhere(traffic.tokens_out, traffic.place)
    dispatch = INTEGER_BYTES * (counts + choices) + item.gate * choices + rows
    return WireBytes(dispatch, item.result * _elsewhere(traffic.tokens_in, traffic.place))


def two_level_bytes(outer: Traffic, inner: Traffic, item: ItemBytes) -> TwoLevelBytes:
    """The same on each level: between a token's rank and gateways, and between a gateway and the ranks of its node."""
    return TwoLevelBytes(token_bytes(outer, item), token_bytes(inner, item))


def expected_share_of_plain(top_k: int, ranks: int, num_experts: int | None = None) -> float:
    """Rows that cross de-duplicated, over rows that cross plainly, for uniform routing; W must divide E.

    A token meets another rank with probability `1 - (1 - 1/W)^K`, where a rank is chosen anew for every choice, instead
    of sending it K/W rows. With `num_experts` the choices are distinct experts, which spread a little further:
    `1 - binomial(E - E/W, K) / binomial(E, K)`.
    """
    missed = (1 - 1 / ranks) ** top_k
    if num_experts is not None:
        missed = comb(num_experts - num_experts // ranks, top_k) / comb(num_experts, top_k)
    return ranks * (1 - missed) / top_k


def _elsewhere(amounts: list[int], place: int) -> int:
    return sum(amounts) - amounts[place]
