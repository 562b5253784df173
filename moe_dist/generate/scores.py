"""Scores of the next token of growing texts, each of which a model reads once.

Shape letters: B texts, S tokens that are read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.model.cache import Cache
from moe_dist.model.places import document_positions
from moe_dist.model.transformer import Transformer


class NextScores:
    """Scores of a batch of texts that grow by one token from call to call, and may end.

    A text that fits the window is read once, into a cache of at most `window` tokens a text. One that has outgrown it
    is read anew for every token, the last `window` tokens as if it began with them. So is every text where an expert
    takes so many tokens of a sequence (`capacity_factor_eval`): what it drops depends on all of them.

    Args:
        model: A plain model in evaluation mode.
        window: It sees at most so many last tokens.
        end_token: What follows one does not see what is before it; None where all is seen.
    """

    def __init__(self, model: Transformer, window: int, end_token: int | None) -> None:
        self.model, self.window, self.end_token = model, window, end_token
        self.device = model.embedding.weight.device
        self._may_keep = model.config.moe.capacity_factor_eval is None
        self._cache: Cache | None = None
        self._kept: list[int] = []

    def of(self, texts: dict[int, list[int]]) -> dict[int, Tensor]:
        """Scores [V] by number of the text; after the first call, texts of the call before with one more token."""
        short = [number for number, tokens in texts.items() if self._may_keep and len(tokens) <= self.window]
        found = self._read_once(short, [texts[number] for number in short]) if short else {}
        return found | {number: self._read_anew(texts[number]) for number in texts if number not in found}

    def _read_once(self, numbers: list[int], texts: Sequence[list[int]]) -> dict[int, Tensor]:
        if self._cache is None:
            self._cache, self._kept = Cache(len(numbers), self.window, self.device), numbers
            new = list(texts)
        elif self._kept != numbers:
            self._cache.select([self._kept.index(number) for number in numbers])
            self._kept = numbers
        if not self._cache.is_empty:
            new = [tokens[-1:] for tokens in texts]
        lengths = [len(tokens) for tokens in new]
        padded_BS = torch.tensor([[*tokens, *[0] * (max(lengths) - len(tokens))] for tokens in new], device=self.device)
        position_BS = None
        if self.end_token is not None and self._cache.is_empty:
            position_BS = document_positions(padded_BS, self.end_token)
        elif self.end_token is not None:
            position_BS = torch.tensor([[_position(tokens, self.end_token)] for tokens in texts], device=self.device)
        hidden_BSD = self.model.continued(padded_BS, lengths, self._cache, position_BS)
        last_BD = hidden_BSD[torch.arange(len(numbers)), torch.tensor(lengths) - 1]
        return dict(zip(numbers, self.model.logits(last_BD), strict=True))

    def _read_anew(self, tokens: list[int]) -> Tensor:
        recent_1S = torch.tensor([tokens[-self.window :]], device=self.device)
        position_1S = None if self.end_token is None else document_positions(recent_1S, self.end_token)
        hidden_1SD, _ = self.model(recent_1S, position_BS=position_1S)
        return self.model.logits(hidden_1SD[0, -1])


def _position(tokens: list[int], end_token: int) -> int:
    """Position of the last token in its document."""
    before = tokens[-2::-1]
    return before.index(end_token) if end_token in before else len(before)
