"""What a person sees of a build: for each stage how far it is, its rates and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from launch.progress import Display

if TYPE_CHECKING:
    from data_pipeline.once import Progress


_AT_ONCE = ("read evaluation text", "find duplicates", "train tokenizer")  # their bytes say nothing of how far they are


class BuildProgress:
    """Takes the progress of a build and shows it on a display.

    Args:
        display: Where it is shown.
        clock: Seconds.
    """

    def __init__(self, display: Display, clock: Callable[[], float] = time.monotonic) -> None:
        self._display, self._clock = display, clock
        self._started: dict[str, float] = {}

    def __call__(self, step: Progress) -> None:
        """Shows one report."""
        now = self._clock()
        seconds = now - self._started.setdefault(step.stage, now)
        self._display.update(step.stage, step.done, step.total, figures(step, seconds), "bytes", step.found)


def figures(step: Progress, seconds: float) -> str:
    """Rates of what this run does itself, and how much of the input it found done.

    Args:
        step: The report.
        seconds: Time since the first report of its stage.
    """
    new = step.done - step.found
    parts = []
    if seconds > 0 and new and step.stage not in _AT_ONCE:
        parts.append(f"{new / seconds / 1e6:.1f} MB/s")
        if step.tokens:
            parts.append(f"{step.tokens / seconds:,.0f} tokens/s")
    if step.found:
        parts.append("found done" if step.found == step.total else f"{step.found / 1e6:.1f} MB found done")
    return "  ".join(parts)
