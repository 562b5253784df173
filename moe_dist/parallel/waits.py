"""How long this rank waits for others: the time its host is blocked in collectives, or ready to run without a core.

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
from pathlib import Path


@dataclass
class Waits:
    """Seconds that were waited so far: in collectives, and of the rest for a core that other programs had."""

    seconds: float = 0.0

    @contextmanager
    def counting(self, inside: bool) -> Iterator[None]:
        """Adds the time of a wait; or of what is no wait, the time without a core, which is no work either."""
        started, delayed = time.perf_counter(), seconds_without_core()
        try:
            yield
        finally:
            delay = seconds_without_core() - delayed
            self.seconds += time.perf_counter() - started - delay if inside else delay


def seconds_without_core() -> float:
    """How long the kernel let this thread wait for a core since it began; 0 where it does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


_WAITS: ContextVar[Waits | None] = ContextVar("waits", default=None)


@contextmanager
def counted_waits() -> Iterator[Waits]:
    """Counts the waits inside, backward passes too: on the CPU they run in the thread that asks for them."""
    waits = Waits()
    token = _WAITS.set(waits)
    try:
        with waits.counting(inside=False):
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
    with waits.counting(inside=True):
        yield
