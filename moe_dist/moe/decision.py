"""What goes into a routing decision beside the hidden states, and the decision itself.

Shape letters: B sequences, S tokens of a sequence, T = B*S tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moe_dist.moe.ledger import Choices
from moe_dist.moe.randomness import Draw


@dataclass(frozen=True)
class RoutingContext:
    """What some routers must know of the tokens beside their hidden states.

    Attributes:
        token_BS: Token ids, int64 (hash routing).
        draw: Names the random numbers of this forward; None outside training, where nothing is drawn.
        demand: Assignments to each expert that are known before the forward, int64 [E] by number of the block: those of
            the whole global batch (exact global balance, counted first), to which the layer adds nothing and asks no
            other rank; or, with running global balance, those of earlier micro-batches. None where nothing is known.
        replay: Choices that are followed instead of choosing, by number of the block; they cover at least the tokens of
            this forward. A block that is not there, or all where it is None, chooses.
        here: Which of the tokens, in a line, are routed by this process; None for all of them.
        taken_demand: The demand that the balance terms of an earlier run of this very forward took, [X, E] by number of
            the block: a recomputed forward takes it again and asks no other rank. None in a first run.
    """

    token_BS: Tensor
    draw: Draw | None = None
    demand: Mapping[int, Tensor] | None = None
    replay: Mapping[int, Choices] | None = None
    here: slice | None = None
    taken_demand: Mapping[int, Tensor] | None = None

    @property
    def first_position(self) -> int:
        """Position of the first of `token_BS` in the global batch; 0 outside training."""
        return 0 if self.draw is None else self.draw.first_row * self.token_BS.shape[1]

    @property
    def token_T(self) -> Tensor:
        """Ids of the tokens that are routed here."""
        token_T = self.token_BS.reshape(-1)
        return token_T if self.here is None else token_T[self.here]

    @property
    def position_T(self) -> Tensor:
        """Positions in the global batch of the tokens that are routed here, int64."""
        assert self.draw is not None, "only tokens of a training step have positions"
        batch, length = self.token_BS.shape
        position_T = self.draw.positions_T(batch, length, self.token_BS.device)
        return position_T if self.here is None else position_T[self.here]

    def followed(self, block: int) -> Choices | None:
        """The choices that a block is to follow for the tokens of this forward, or None where it chooses."""
        if self.replay is None or block not in self.replay:
            return None
        first = 0 if self.here is None else self.here.start
        return self.replay[block].part(self.first_position + first, self.token_T.numel())


@dataclass(frozen=True)
class RoutingDecision:
    """What the router says about each token, before any capacity is applied.

    Attributes:
        logits_TE: Raw scores, fp32 or wider.
        probability_TE: Scores normalised over all experts: what the balance term sees and what drops are ordered by.
        expert_TK: Chosen experts, int64, highest selection score first; ties go to the lower expert id.
        gate_TK: Weight of each chosen expert, differentiable.
        asks_TK: False where a choice is not carried out (a random second expert left out); None where all are.
    """

    logits_TE: Tensor
    probability_TE: Tensor
    expert_TK: Tensor
    gate_TK: Tensor
    asks_TK: Tensor | None = None
