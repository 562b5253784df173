"""A bigram language model over tokens: the baseline that a trained model must beat.

Interpolated modified Kneser-Ney smoothing: a discount (for counts 1, 2 and 3 or more) is taken from every pair that was
seen, and what it frees goes to the target's share of distinct contexts; that share is itself smoothed, towards equal
probabilities. Every probability is positive, and those after a context sum to 1.

Source: Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_dist.errors import DataError

_PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class BigramScore:
    """A score on held-out rows.

    Attributes:
        nats: Sum of -log p over the targets.
        tokens: Number of targets.
        text_bytes: UTF-8 bytes of text that the targets stand for.
    """

    nats: float
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens


class BigramModel:
    """Counts of pairs and the probabilities that follow from them.

    Args:
        pairs: Distinct `context * V + target`, sorted: [P] int64.
        counts: How often each was seen: [P] int64.
        vocab_size: V.
    """

    def __init__(self, pairs: NDArray[np.int64], counts: NDArray[np.int64], vocab_size: int) -> None:
        contexts, targets = np.divmod(pairs, vocab_size)
        discounts = discounts_of(counts)[np.minimum(counts, 3)]
        seen = np.bincount(contexts, weights=counts, minlength=vocab_size)
        freed = np.bincount(contexts, weights=discounts, minlength=vocab_size)
        known = seen > 0
        self._vocab_size, self._pairs = vocab_size, pairs
        self._pair_shares = (counts - discounts) / seen[contexts]
        self._back_off = np.where(known, freed / np.where(known, seen, 1), 1.0)  # all of it after an unknown context
        self._target_probabilities = _smoothed_shares(np.bincount(targets, minlength=vocab_size))

    def probabilities(self, contexts: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """p(target | context) for each pair: [N] float64."""
        wanted = contexts * self._vocab_size + targets
        places = np.minimum(np.searchsorted(self._pairs, wanted), len(self._pairs) - 1)
        shares = np.where(self._pairs[places] == wanted, self._pair_shares[places], 0.0)
        return shares + self._back_off[contexts] * self._target_probabilities[targets]

    def score(self, rows: Iterable[NDArray[np.int64]], token_bytes: NDArray[np.int64]) -> BigramScore:
        """Scores rows.

        Args:
            rows: Arrays [n, S + 1] of held-out tokens.
            token_bytes: UTF-8 bytes that each token stands for: [V].

        Raises:
            DataError: The rows hold no text.
        """
        nats, tokens, text_bytes = 0.0, 0, 0
        for part in rows:
            contexts, targets = _pairs_of(part)
            nats -= float(np.log(self.probabilities(contexts, targets)).sum())
            tokens += len(targets)
            text_bytes += int(token_bytes[targets].sum())
        if not text_bytes:
            raise DataError("held-out rows", f"{tokens} tokens", "they stand for some text", "hold out more text")
        return BigramScore(nats, tokens, text_bytes)


def count_bigrams(rows: Iterable[NDArray[np.int64]], vocab_size: int) -> BigramModel:
    """Counts the (input, target) pairs of rows.

    Args:
        rows: Arrays [n, S + 1] of training tokens, below 0 for padding, for instance `TokenSplit.all_rows`.
        vocab_size: V; ids are below it.

    Raises:
        DataError: There is no pair.
    """
    pairs, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    pending: list[NDArray[np.int64]] = []
    size = 0
    for part in rows:
        contexts, targets = _pairs_of(part)
        pending.append(contexts * vocab_size + targets)
        size += pending[-1].size
        if size >= _PAIRS_AT_ONCE:
            pairs, counts = _add_pairs(pairs, counts, np.concatenate(pending))
            pending, size = [], 0
    if pending:
        pairs, counts = _add_pairs(pairs, counts, np.concatenate(pending))
    if not len(pairs):
        raise DataError("training rows", "no pair of tokens", "there is text to count", "train on more text")
    return BigramModel(pairs, counts, vocab_size)


def discounts_of(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Discounts for counts 0 (unused), 1, 2 and 3 or more: [4].

    Departs from the source where the estimate cannot be made or leaves (0, count): few or odd counts.
    """
    n = [int((counts == k).sum()) for k in range(5)]
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
    discounts = np.zeros(4)
    for k in (1, 2, 3):
        estimate = k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0.5 * k
        discounts[k] = min(max(estimate, 0.1), k - 0.1)
    return discounts


def _pairs_of(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(contexts, targets) of rows; padding is no target, and stands behind all that are."""
    contexts, targets = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    counted = targets >= 0
    return (contexts, targets) if counted.all() else (contexts[counted], targets[counted])


def _add_pairs(
    pairs: NDArray[np.int64], counts: NDArray[np.int64], more: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    new_pairs, new_counts = np.unique(more, return_counts=True)
    merged, places = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
    total = np.zeros(len(merged), dtype=np.int64)
    np.add.at(total, places, np.concatenate([counts, new_counts]))
    return merged, total


def _smoothed_shares(contexts_of_target: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each target's share of distinct contexts, discounted and interpolated with equal probabilities: [V]."""
    discounts = discounts_of(contexts_of_target[contexts_of_target > 0])[np.minimum(contexts_of_target, 3)]
    total = contexts_of_target.sum()
    shares = (contexts_of_target - discounts) / total + discounts.sum() / total / len(contexts_of_target)
    return np.asarray(shares, dtype=np.float64)
