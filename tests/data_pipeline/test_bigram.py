from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.bigram import count_bigrams, discounts_of
from data_pipeline.build import open_tokenizer
from data_pipeline.shards import TokenSplit
from moe_dist.errors import DataError


def _slow_probability(pairs: list[tuple[int, int]], vocab_size: int, context: int, target: int) -> float:
    """Interpolated modified Kneser-Ney, word for word."""
    counts = Counter(pairs)
    d = discounts_of(np.array(list(counts.values())))
    contexts_of: dict[int, set[int]] = defaultdict(set)
    for a, b in counts:
        contexts_of[b].add(a)
    continuation = {b: len(found) for b, found in contexts_of.items()}
    e = discounts_of(np.array(list(continuation.values())))
    freed = sum(e[min(3, n)] for n in continuation.values()) / len(counts)
    n = continuation.get(target, 0)
    lower = (n - e[min(3, n)] if n else 0.0) / len(counts) + freed / vocab_size
    after = {b: n for (a, b), n in counts.items() if a == context}
    if not after:
        return float(lower)
    total = sum(after.values())
    back_off = sum(d[min(3, n)] for n in after.values()) / total
    n = after.get(target, 0)
    return float((n - d[min(3, n)] if n else 0.0) / total + back_off * lower)


rows_of_tokens = st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=1, max_size=12)


@settings(deadline=None)
@given(rows_of_tokens)
def test_probabilities_are_positive_equal_the_slow_ones_and_sum_to_one(rows: list[list[int]]) -> None:
    model = count_bigrams([np.array(part).reshape(-1, 4).astype(np.int64) for part in (rows[:3], rows[3:])], 7)
    pairs = [(row[i], row[i + 1]) for row in rows for i in range(3)]
    for context in range(7):
        found = model.probabilities(np.full(7, context), np.arange(7))
        assert found.min() > 0
        assert abs(found.sum() - 1) < 1e-12
        slow = [_slow_probability(pairs, 7, context, target) for target in range(7)]
        assert np.allclose(found, slow, rtol=1e-12)


def test_score_sums_nats_and_the_bytes_of_the_targets() -> None:
    model = count_bigrams([np.array([[0, 1, 2, 0, 1, 2, 0, 1]])], 4)
    token_bytes = np.array([0, 3, 5, 7])
    score = model.score([np.array([[0, 1, 2], [1, 0, 3]])], token_bytes)
    wanted = -np.log(model.probabilities(np.array([0, 1, 1, 0]), np.array([1, 2, 0, 3]))).sum()
    assert score.nats == pytest.approx(wanted)
    assert (score.tokens, score.text_bytes) == (4, 15)
    assert score.bits_per_byte == pytest.approx(wanted / math.log(2) / 15)


def test_count_in_many_parts_is_the_count_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).zipf(1.5, (400, 33)).clip(max=50) - 1
    whole = count_bigrams([tokens], 50)
    monkeypatch.setattr("data_pipeline.bigram._PAIRS_AT_ONCE", 500)
    parts = count_bigrams(np.array_split(tokens, 57), 50)
    grid = [axis.ravel() for axis in np.meshgrid(np.arange(50), np.arange(50))]
    assert np.array_equal(whole.probabilities(*grid), parts.probabilities(*grid))


def test_score_of_a_known_chain_comes_near_its_entropy() -> None:
    rng = np.random.default_rng(1)
    chain = rng.dirichlet(np.full(20, 0.3), size=20)
    tokens = [0]
    for _ in range(60_000):
        tokens.append(int(rng.choice(20, p=chain[tokens[-1]])))
    train, held = np.array([tokens[:50_001]]), np.array([tokens[50_000:]])
    score = count_bigrams([train], 20).score([held], np.ones(20, dtype=np.int64))
    truth = -np.log(chain[held[0, :-1], held[0, 1:]]).mean()
    assert truth <= score.nats_per_token < truth * 1.01


def test_score_on_a_build_beats_single_tokens(built: Path) -> None:
    tokenizer = open_tokenizer(built)
    train, held = TokenSplit(built, "train"), TokenSplit(built, "heldout")
    model = count_bigrams(train.all_rows(32), tokenizer.size)
    score = model.score(held.all_rows(32), tokenizer.token_bytes())
    targets = np.concatenate(list(held.all_rows(32)))[:, 1:].ravel()
    frequency = np.bincount(np.concatenate(list(train.all_rows(32)))[:, 1:].ravel(), minlength=tokenizer.size) + 1.0
    assert score.nats < -np.log(frequency / frequency.sum())[targets].sum()
    assert score.text_bytes == tokenizer.token_bytes()[targets].sum()


def test_count_of_nothing_and_score_of_no_text_are_errors() -> None:
    with pytest.raises(DataError, match="no pair"):
        count_bigrams([np.zeros((0, 5), dtype=np.int64)], 7)
    with pytest.raises(DataError, match="held-out"):
        count_bigrams([np.array([[0, 1]])], 7).score([], np.ones(7, dtype=np.int64))
