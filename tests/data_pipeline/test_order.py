"""The block-wise order of a source: every row once in an epoch, near its neighbours, the same in both forms."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import BlockOrder

ORDERS = st.builds(
    BlockOrder, st.integers(0, 2**70), st.just("a"), st.integers(1, 300), st.integers(1, 40), st.integers(1, 10)
)


@settings(deadline=None, max_examples=60)
@given(ORDERS, st.integers(0, 3))
def test_order_every_epoch_has_each_row_once_and_both_forms_agree(order: BlockOrder, epoch: int) -> None:
    numbers = np.arange(epoch * order.num_rows, (epoch + 1) * order.num_rows)
    rows = order.rows(numbers)
    assert sorted(rows.tolist()) == list(range(order.num_rows))
    assert [order.row(number) for number in numbers.tolist()] == rows.tolist()


@settings(deadline=None, max_examples=40)
@given(ORDERS, st.data())
def test_order_of_scattered_numbers_is_that_of_each_alone(order: BlockOrder, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 5 * order.num_rows), min_size=1, max_size=20))
    assert order.rows(np.array(numbers)).tolist() == [order.row(number) for number in numbers]


def test_order_uses_the_blocks_of_one_window_at_a_time() -> None:
    order = BlockOrder(3, "a", 64_000, 100, 8)
    blocks = order.rows(np.arange(64_000)).reshape(-1, 800) // 100
    assert all(len(set(window.tolist())) == 8 for window in blocks)
    assert len({tuple(sorted(set(window.tolist()))) for window in blocks}) == 80


def test_order_differs_between_epochs_seeds_and_sources() -> None:
    rows = [BlockOrder(*key, 1000, 10, 4).rows(np.arange(2000)).tolist() for key in ((0, "a"), (1, "a"), (0, "b"))]
    assert len({tuple(part) for row in rows for part in (row[:1000], row[1000:])}) == 6


def test_order_short_block_stands_anywhere() -> None:
    order = BlockOrder(0, "a", 43, 10, 1)
    rows = order.rows(np.arange(43 * 400)).reshape(400, 43)
    places = (rows >= 40).argmax(axis=1) // 10
    assert min(np.bincount(places, minlength=5)) > 400 / 5 * 0.6


def test_order_position_of_a_row_is_even_over_epochs() -> None:
    order, epochs, size = BlockOrder(11, "a", 24, 4, 3), 1500, 24
    rows = order.rows(np.arange(size * epochs)).reshape(epochs, size)
    counts = np.stack([np.bincount(rows[:, place], minlength=size) for place in range(size)])
    expected = epochs / size
    chi_square, freedom = float(((counts - expected) ** 2 / expected).sum()), (size - 1) ** 2
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
