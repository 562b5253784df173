"""Which part of the vocabulary a process scores. Shape letters: T tokens, C tokens of a chunk, D model width."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class VocabularyShare(Protocol):
    """Neighbouring ids whose scores are made here, and what the processes of a group tell each other about theirs."""

    @property
    def first(self) -> int:
        """The first id that is scored here."""
        ...

    def hidden(self, x_BSD: Tensor) -> Tensor:
        """Final hidden states of all tokens of a micro-batch, [T, D], from those of the tokens here; differentiable."""
        ...

    def largest(self, value_C: Tensor) -> Tensor:
        """The largest of all processes; may overwrite what it is given."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes; may overwrite what it is given."""
        ...


class WholeVocabulary:
    """Every id is scored here."""

    first = 0

    def hidden(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.flatten(0, -2)

    def largest(self, value_C: Tensor) -> Tensor:
        return value_C

    def total(self, value: Tensor) -> Tensor:
        return value
