"""How long this rank waits for others: the time its host is blocked in collectives.

What a rank's step takes less what it waited is its own work, by which a slow rank can be told from those that wait for
it. Exchanges that a library makes (the parts of `fsdp`, the shares of `zero1`) are not seen, and on a GPU the host does
not block in a collective at all: there nothing can be told from these times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Waits:
    """Seconds that were waited so far."""

    seconds: float = 0.0


_WAITS: ContextVar[Waits | None] = ContextVar("waits", default=None)


@contextmanager
def counted_waits() -> Iterator[Waits]:
    """Counts the waits inside, backward passes too: on the CPU they run in the thread that asks for them."""
    waits = Waits()
    token = _WAITS.set(waits)
    try:
        yield waits
    finally:
        _WAITS.reset(token)


@contextmanager
def waiting() -> Iterator[None]:
    """Marks what is a wait for others."""
    waits = _WAITS.get()
    if waits is None:
        yield
        return
    started = time.perf_counter()
    try:
        yield
    finally:
        waits.seconds += time.perf_counter() - started
