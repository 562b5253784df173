"""What a row of token ids says: inputs, targets, which of these count, and where documents begin.

Shape letters: B rows, S tokens of a row, T = B*S tokens.

    row        a b . c . # #        (. is end-of-text, # is `PADDING`)
    inputs     a b . c . 0          S of them; padding has some id, which nothing that counts sees
    targets    b . c . # #          the last S of the row
    counted    1 1 1 1 0 0          a position counts where its target is a token

A position that does not count leaves no trace: no loss, no routed expert, no capacity, no demand, no balance term.
Causal attention keeps padding at the end of a row, or in a document of its own, from what counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_dist.model.places import document_positions

PADDING = -100  # in a row in place of a token id; any id below 0 is read so


@dataclass(frozen=True)
class MicroBatch:
    """Rows as the model and its loss take them.

    Attributes:
        tokens_BS: Input ids, int64.
        target_BS: Ids to be predicted, int64; below 0 where there is none.
        counted_BS: Whether each position counts; None where all do.
        position_BS: Of each token in its document, where documents do not see each other; None where they do.
    """

    tokens_BS: Tensor
    target_BS: Tensor
    counted_BS: Tensor | None = None
    position_BS: Tensor | None = None

    @staticmethod
    def of(rows: Tensor, end_of_text: int | None = None) -> MicroBatch:
        """Reads rows.

        Args:
            rows: Ids int64 [B, S+1], `PADDING` where there is no token.
            end_of_text: The id that ends a document, where documents do not see each other; None where they do.
        """
        given_BS, target_BS = rows[:, :-1], rows[:, 1:]
        position_BS = None if end_of_text is None else document_positions(given_BS, end_of_text)
        if not bool((rows < 0).any()):
            return MicroBatch(given_BS, target_BS, None, position_BS)
        return MicroBatch(given_BS.clamp(min=0), target_BS, target_BS >= 0, position_BS)

    def targets(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states, targets) of the positions that count, from the hidden states of all."""
        target_T = self.target_BS.flatten()
        if self.counted_BS is None:
            return hidden_TD, target_T
        place_C = self.counted_BS.flatten().nonzero()[:, 0]
        return hidden_TD.index_select(0, place_C), target_T[place_C]


def counted_tokens(rows: Tensor) -> Tensor:
    """Number of positions of rows [B, S+1] that count, int64 scalar."""
    return (rows[:, 1:] >= 0).sum()
