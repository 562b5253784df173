from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.permutation import row_order


@settings(deadline=None)
@given(st.integers(0, 2**70), st.integers(1, 600), st.integers(0, 5))
def test_row_order_every_epoch_has_each_row_once(seed: int, num_rows: int, epoch: int) -> None:
    order = [row_order(seed, num_rows, epoch * num_rows + i) for i in range(num_rows)]
    assert sorted(order) == list(range(num_rows))


def test_row_order_is_the_same_on_every_machine_and_version() -> None:
    assert [row_order(7, 1000, i) for i in (0, 1, 2, 999, 1000, 123_456_789)] == [690, 623, 574, 326, 498, 114]


def test_row_order_differs_between_epochs_and_seeds() -> None:
    first = [row_order(0, 500, i) for i in range(500)]
    assert first != [row_order(0, 500, 500 + i) for i in range(500)]
    assert first != [row_order(1, 500, i) for i in range(500)]
    assert first != list(range(500))


@pytest.mark.parametrize("num_rows", [2, 3, 5, 16, 17])
def test_row_order_first_row_is_even_over_seeds(num_rows: int) -> None:
    seen = Counter(row_order(seed, num_rows, 0) for seed in range(300 * num_rows))
    assert min(seen[row] for row in range(num_rows)) > 300 * 0.7


def test_row_order_neighbours_are_spread() -> None:
    order = [row_order(3, 10_000, i) for i in range(10_000)]
    steps = [abs(a - b) for a, b in pairwise(order)]
    assert abs(sum(steps) / len(steps) - 10_000 / 3) < 150
    assert sum(step == 1 for step in steps) < 12


def test_row_order_of_a_huge_split_is_immediate() -> None:
    assert 0 <= row_order(0, 10**15, 10**18 + 7) < 10**15
