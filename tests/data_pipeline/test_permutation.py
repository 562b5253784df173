from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.permutation import Shuffle

KEYS = [((0, "a"), 0), ((0, "a"), 1), ((1, "a"), 0), ((0, "b"), 0)]


def test_shuffle_is_the_same_on_every_machine_and_version() -> None:
    shuffle = Shuffle(7, "test")
    assert [shuffle.place(value, 1000, 5) for value in (0, 1, 2, 999)] == [174, 119, 337, 186]


def test_shuffle_differs_between_tweaks_seeds_and_purposes() -> None:
    orders = [Shuffle(*words).places(np.arange(500), 500, tweak).tolist() for words, tweak in KEYS]
    assert all(a != b for a, b in combinations([*orders, list(range(500))], 2))


def test_shuffle_neighbours_are_spread() -> None:
    order = Shuffle(3, "test").places(np.arange(10_000), 10_000).tolist()
    steps = [abs(a - b) for a, b in pairwise(order)]
    assert abs(sum(steps) / len(steps) - 10_000 / 3) < 150
    assert sum(step == 1 for step in steps) < 12


def test_shuffle_of_a_huge_size_is_immediate() -> None:
    assert 0 <= Shuffle(0, "test").place(10**15 - 1, 10**15, 10**18) < 10**15


@settings(deadline=None)
@given(st.integers(0, 2**70), st.integers(1, 600), st.integers(0, 2**40))
def test_shuffle_is_a_permutation_and_both_forms_agree(seed: int, size: int, tweak: int) -> None:
    shuffle = Shuffle(seed, "test")
    places = shuffle.places(np.arange(size), size, tweak, 3)
    assert sorted(places.tolist()) == list(range(size))
    assert [shuffle.place(value, size, tweak, 3) for value in range(size)] == places.tolist()


@pytest.mark.parametrize("size", [2, 4, 7, 16])
def test_shuffle_places_and_pairs_are_even_over_tweaks(size: int) -> None:
    """Chi-square of the place of each value, and of the places of the first two, within four standard deviations."""
    shuffle, times = Shuffle(2, "even"), 1500
    found = np.stack([shuffle.places(np.arange(size), size, tweak) for tweak in range(times)])
    single = np.stack([np.bincount(found[:, value], minlength=size) for value in range(size)])
    pairs = np.bincount(found[:, 0] * size + found[:, 1], minlength=size * size).reshape(size, size)
    for counts, freedom in ((single.ravel(), (size - 1) ** 2), (pairs[~np.eye(size, dtype=bool)], size**2 - size - 1)):
        expected = counts.mean()
        assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 4 * (2 * freedom) ** 0.5


def test_shuffle_pairs_of_a_tiny_size_are_even_over_many_tweaks() -> None:
    shuffle = Shuffle(2, "even")
    pairs = Counter((shuffle.place(0, 4, tweak), shuffle.place(1, 4, tweak)) for tweak in range(20_000))
    expected, freedom = 20_000 / 12, 11
    assert len(pairs) == 12
    assert abs(sum((n - expected) ** 2 / expected for n in pairs.values()) - freedom) < 4 * (2 * freedom) ** 0.5


def test_order_arithmetic_imports_only_numpy() -> None:
    code = "import sys, data_pipeline.run_order; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pyarrow", "torch", "pydantic", "ray"} & {name.partition(".")[0] for name in loaded}
