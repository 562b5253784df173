"""Sample g of a run -> a row of a source. A pure function of the seed and g, in memory that does not grow with either.

    sample g  --mixture-->  sample n of source s  --block order of s-->  row r of s

Imports no more than numpy: ten thousand million samples cost a process no other memory than ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.mixture import Mixture, Stage
from data_pipeline.order import BLOCK_TOKENS, BlockOrder, groups_of

ORDER_VERSION = 2  # 1 shuffled all rows of one source
_CHUNK = 4096  # samples that are located at once; neighbours share all of the arithmetic but the last steps


class RunOrder:
    """The order of all samples of a run.

    Args:
        seed: Seed of the run.
        rows: Rows of each source that takes part, in the order of the build.
        stages: The mixture.
        sequence_length: Tokens of a row.
        window_tokens: Tokens of a source that are shuffled together, rounded down to whole blocks.
    """

    def __init__(
        self, seed: int, rows: Mapping[str, int], stages: Sequence[Stage], sequence_length: int, window_tokens: int
    ) -> None:
        self.seed, self.sequence_length = seed, sequence_length
        self.block_rows = max(1, BLOCK_TOKENS // sequence_length)
        self.window_blocks = max(1, window_tokens // (self.block_rows * sequence_length))
        self.mixture = Mixture(seed, list(rows), stages)
        self._orders = [
            BlockOrder(seed, name, max(1, number), self.block_rows, self.window_blocks) for name, number in rows.items()
        ]
        self._chunks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def locate(self, sample: int) -> tuple[int, int]:
        """(place of the source, row of it) of one sample. The plain form, which `locate_range` must equal."""
        source, number = self.mixture.locate(sample)
        return source, self._orders[source].row(number)

    def locate_range(self, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sources, rows) of samples [first, end): two arrays [end - first]."""
        parts = [self._part(chunk, first, end) for chunk in range(first // _CHUNK, -(-end // _CHUNK))]
        if not parts:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the order, for a checkpoint: another value of any of these is another order."""
        return {
            "order": ORDER_VERSION,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "mixture_sha256": self.mixture.sha256,
            "window_blocks": self.window_blocks,
        }

    def _part(self, chunk: int, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples of a chunk that are in [first, end)."""
        if chunk not in self._chunks:
            if len(self._chunks) > 1:
                del self._chunks[min(self._chunks)]
            self._chunks[chunk] = self._locate(chunk * _CHUNK)
        here = slice(max(0, first - chunk * _CHUNK), end - chunk * _CHUNK)
        sources, rows = self._chunks[chunk]
        return sources[here], rows[here]

    def _locate(self, first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        last = first + _CHUNK
        if self.mixture.num_samples is not None:
            last = min(last, self.mixture.num_samples)
        sources, numbers = self.mixture.locate_range(first, last)
        rows = np.empty_like(numbers)
        for source, inside in groups_of(sources):
            rows[inside] = self._orders[source].rows(numbers[inside])
        return sources, rows
