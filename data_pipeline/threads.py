"""Work items in this process, some of them at the same time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from data_pipeline.survey import WorkItem

T = TypeVar("T")


def in_threads(
    work: Callable[[WorkItem], T], items: list[WorkItem], at_once: int, stop: threading.Event
) -> Generator[tuple[int, T], None, None]:
    """Yields (index of the item, result) in the order of the items, so that the first error is that of the first item.

    Args:
        work: What is done with an item; it has to look at `stop` from time to time where `at_once` is not 1.
        items: The items.
        at_once: How many are worked on at the same time; 1 works in the caller's own thread.
        stop: Set where the caller gives up, or an item has an error: what is at work then is waited for.
    """
    if at_once == 1:
        yield from ((item.index, work(item)) for item in items)
        return
    waiting: deque[tuple[int, Future[T]]] = deque()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for item in items:
                waiting.append((item.index, pool.submit(work, item)))
                if len(waiting) > at_once:
                    index, future = waiting.popleft()
                    yield index, future.result()
            for index, future in waiting:
                yield index, future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
