from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from data_pipeline.survey import WorkItem
from data_pipeline.threads import in_threads

ITEMS = [WorkItem(index, ()) for index in range(20)]


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_results_come_in_order_whichever_is_done_first(at_once: int) -> None:
    later = threading.Event()

    def work(item: WorkItem) -> int:
        if at_once > 1 and item.index == 0:
            assert later.wait(60)
        if item.index == 1:
            later.set()
        return 10 * item.index

    assert list(in_threads(work, ITEMS, at_once, threading.Event())) == [(i, 10 * i) for i in range(20)]


def test_error_of_the_first_item_is_raised_and_what_is_at_work_is_stopped() -> None:
    stop, failed = threading.Event(), threading.Event()
    begun: list[int] = []

    def work(item: WorkItem) -> None:
        begun.append(item.index)
        if item.index == 3:
            assert failed.wait(60)
            raise ValueError("of item 3")
        if item.index == 4:
            failed.set()
            assert stop.wait(60)
            raise CancelledError

    with pytest.raises(ValueError, match="of item 3"):
        list(in_threads(work, ITEMS, 2, stop))
    assert max(begun) <= 5


def test_caller_that_gives_up_stops_what_is_at_work() -> None:
    stop = threading.Event()
    ended: list[int] = []

    def work(item: WorkItem) -> None:
        if item.index:
            assert stop.wait(60)
        ended.append(item.index)

    results = in_threads(work, ITEMS, 2, stop)
    assert next(results) == (0, None)
    results.close()
    assert stop.is_set()
    assert sorted(ended) in ([0, 1, 2], [0, 1], [0, 2])
