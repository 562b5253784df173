"""What a model keeps of the tokens that it has seen, so that text is made without seeing a token twice.

Shape letters: B rows, S new tokens of a row, X numbers of a token, R tokens that are kept.

    first call     all tokens of the prompts, rows padded at their end        lengths 5 3 4
    every other    one token a row, right behind what was seen

Two kinds of memory, by the name of who keeps them: a *ring* holds the last R tokens, the token at place p in slot
p mod R (keys and values: R is the longest text, or the window); a *tail* holds the last few in order (the inputs of a
causal convolution). Both are bounded: nothing grows after the first call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Cache:
    """The memory of a batch of rows.

    Attributes:
        seen: Tokens of each row before this call.
        new: Tokens of each row in this call.
        most_tokens: Longest row.
    """

    def __init__(self, rows: int, most_tokens: int, device: torch.device) -> None:
        self.seen, self.new, self.most_tokens, self.device = [0] * rows, [0] * rows, most_tokens, device
        self._rings: dict[str, Tensor] = {}
        self._tails: dict[str, Tensor] = {}

    @property
    def is_empty(self) -> bool:
        """Whether this is the first call."""
        return not any(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(kept.nbytes for kept in (*self._rings.values(), *self._tails.values()))

    def begin(self, lengths: Sequence[int]) -> None:
        """Announces how many new tokens each row has; the model calls it, and `end` after the last layer."""
        self.new = list(lengths)
        longest = max(s + n for s, n in zip(self.seen, self.new, strict=True))
        assert longest <= self.most_tokens, f"a cache of {self.most_tokens} tokens cannot take {longest}"
        assert self.is_empty or max(self.new) == 1, "after the first call every row has one new token"

    def end(self) -> None:
        """The new tokens are seen."""
        self.seen = [s + n for s, n in zip(self.seen, self.new, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows only."""
        self.seen = [self.seen[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        for memory in (self._rings, self._tails):
            for name, kept in memory.items():
                memory[name] = kept[index]

    def first_places(self) -> Tensor:
        """Where the first new token of each row stands, int64 [B]."""
        return torch.tensor(self.seen, device=self.device)

    def slot_places(self, most: int | None = None) -> Tensor:
        """Where the token in each slot of a ring stands in its row, int64 [B, R]; negative in empty slots."""
        size = self._size(most)
        last_B1 = self.first_places()[:, None] + torch.tensor(self.new, device=self.device)[:, None] - 1
        return last_B1 - (last_B1 - torch.arange(size, device=self.device)) % size

    def ring(self, name: str, new_BSX: Tensor, most: int | None = None) -> Tensor:
        """Takes the new tokens in and returns the slots, [B, R, X].

        Args:
            name: Of the one who keeps them.
            new_BSX: Of the new tokens.
            most: Tokens that are kept, where these are fewer than the longest row.
        """
        if self.is_empty:
            place_BR = self.slot_places(most).clamp(min=0)
            self._rings[name] = new_BSX.gather(1, place_BR[..., None].expand(-1, -1, new_BSX.shape[2]))
        else:
            row_B = torch.arange(len(self.seen), device=self.device)
            self._rings[name][row_B, self.first_places() % self._size(most)] = new_BSX[:, 0]
        return self._rings[name]

    def tail(self, name: str, new_BSX: Tensor, count: int) -> Tensor:
        """Takes the new tokens in and returns the `count` just before them, [B, count, X]; zeros before a row's begin.

        Args:
            name: Of the one who keeps them.
            new_BSX: Of the new tokens.
            count: Tokens that are kept.
        """
        rows, _, numbers = new_BSX.shape
        before = self._tails.get(name, new_BSX.new_zeros(rows, count, numbers))
        place_BR = torch.tensor(self.new, device=self.device)[:, None] + torch.arange(count, device=self.device)
        both = torch.cat([before, new_BSX], dim=1)
        self._tails[name] = both.gather(1, place_BR[..., None].expand(-1, -1, numbers))
        return before

    def _size(self, most: int | None) -> int:
        return self.most_tokens if most is None else min(most, self.most_tokens)
