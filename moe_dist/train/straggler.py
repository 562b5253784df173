"""A rank that is much slower than the others in its own work, waits for others left out (`parallel/waits.py`).

The rule is to hold on a machine whose cores others use too, which makes some steps of any rank long but none short: of
each rank the lower quartile of the last 13 steps, which is long only if ten of them are; a rank is slow when it is
`watch.straggler_ratio` times the median of the others', and 10 ms more; it is told after six such steps in a row, and
again when it has come below three quarters of that ratio for as long.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_WINDOW, _IN_A_ROW, _QUARTER = 13, 6, 3
_LEAST_SECONDS = 0.01
_OVER = 0.75  # of the ratio, below which a rank is as the others again


@dataclass
class Straggler:
    """Judges the own seconds of all ranks, step by step.

    Args:
        ratio: From which a rank is slow; None judges nothing.
    """

    ratio: float | None
    _recent: deque[Sequence[float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _in_a_row: dict[int, int] = field(default_factory=dict)
    _slow: set[int] = field(default_factory=set)

    def see(self, step: int, own_seconds: Sequence[float]) -> Iterator[Mapping[str, Any]]:
        """Takes what each rank worked; told with step number `step` (from 1)."""
        if self.ratio is None or len(own_seconds) < 2 or not all(own_seconds):
            return
        self._recent.append(own_seconds)
        if len(self._recent) < _WINDOW:
            return
        usual = [sorted(seconds)[_QUARTER] for seconds in zip(*self._recent, strict=True)]
        for rank, seconds in enumerate(usual):
            others = statistics.median(usual[:rank] + usual[rank + 1 :])
            limit = self.ratio * (_OVER if rank in self._slow else 1.0)
            slow = seconds > limit * others and seconds - others > _LEAST_SECONDS
            turned = slow != (rank in self._slow)
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if turned else 0
            if self._in_a_row[rank] >= _IN_A_ROW:
                self._in_a_row[rank] = 0
                self._slow ^= {rank}
                yield self._alarm(step, rank, seconds, others)

    def _alarm(self, step: int, rank: int, seconds: float, others: float) -> Mapping[str, Any]:
        slow = rank in self._slow
        times = f"{seconds / others:.1f} times"
        said = f"works {times} as long as the others" if slow else "works as fast as the others again"
        text = f"step {step}: rank {rank} {said} ({seconds:.3f} s a step, others {others:.3f} s)"
        told = {"step": step, "rank": rank, "seconds": seconds, "others": others, "text": text}
        return {"kind": "straggler" if slow else "straggler_recovered", **told}
