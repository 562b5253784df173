from __future__ import annotations

import numpy as np

from data_pipeline.examples import MOST_EXAMPLES, choose_pairs, pair_examples
from data_pipeline.near import NearDuplicates


def test_pairs_are_at_even_distances_from_the_least_similar_to_the_most() -> None:
    number = 10 * MOST_EXAMPLES + 1
    order = np.random.default_rng(0).permutation(number)
    near = NearDuplicates(order + 1000, order, order / number)
    pairs = choose_pairs(near)
    assert len(pairs) == MOST_EXAMPLES
    assert [pairs[0], pairs[-1]] == [(1000, 0, 0.0), (1000 + number - 1, number - 1, (number - 1) / number)]
    steps = np.diff([kept for _, kept, _ in pairs])
    assert set(steps.tolist()) <= {10, 11}
    few = NearDuplicates(near.gone[:3], near.kept[:3], near.similarity[:3])
    assert sorted(choose_pairs(few)) == sorted(zip(*(part.tolist() for part in vars(few).values()), strict=True))
    empty = np.zeros(0, dtype=np.int64)
    assert choose_pairs(NearDuplicates(empty, empty, empty.astype(float))) == []


def test_example_shows_both_beginnings_and_where_they_differ() -> None:
    same = "".join(f"word{i} " for i in range(400))
    notes = {0: ("a", f"{same}one thing"), 1: ("b", f"{same}another thing"), 2: ("c", "short"), 3: ("d", "shirt")}
    far, close = pair_examples([(0, 1, 0.98765), (2, 3, 0.7)], notes)
    assert (far["gone"], far["kept"], far["similarity"]) == ("a", "b", 0.988)
    for text, end in ((far["gone_text"], "one thing"), (far["kept_text"], "another thing")):
        assert text.startswith(same[:100])
        assert text.endswith(f"{same[-50:]}{end}")
        assert len(text) < 400
    assert (close["gone_text"], close["kept_text"]) == ("short", "shirt")
