"""The order of the rows of one source: block-wise, so that shards are read nearly in sequence.

The rows of an epoch are cut into blocks of neighbours. Blocks are put in a keyed order; so many of them as fit a window
are taken together, and the rows within a window are shuffled. So at any time only the blocks of one window are in use,
which a cache can hold decoded. What is left over at the end of the rows is one short block, put at a keyed place of its
own. Everything is computed for one row number at a time, from integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.permutation import Shuffle

BLOCK_TOKENS = 2**18


@dataclass(frozen=True)
class BlockOrder:
    """An endless order in which every epoch of `num_rows` numbers has each row once.

    Attributes:
        seed: Seed of the order.
        source: Name of the source.
        num_rows: Its rows, at least 1.
        block_rows: Rows of a block.
        window_blocks: Most blocks that are shuffled together.
    """

    seed: int
    source: str
    num_rows: int
    block_rows: int
    window_blocks: int

    def row(self, number: int) -> int:
        """The row that is number `number` of the source's order. The plain form, which `rows` must equal."""
        epoch, position = divmod(number, self.num_rows)
        tail = self._tail_place(epoch)
        window = self._place(position, tail) // self._window_places
        start, stop = self._window(window, tail)
        position = start + self._within.place(position - start, stop - start, epoch, window)
        place = self._place(position, tail)
        block = self._num_blocks
        if place != tail:
            block = self._blocks.place(place - (place > tail), self._num_blocks, epoch)
        return block * self.block_rows + position - self._start(place, tail)

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of many numbers: [N]."""
        rows = np.empty_like(numbers)
        epochs, positions = np.divmod(numbers, self.num_rows)
        for epoch, inside in groups_of(epochs):
            rows[inside] = self._rows_of_epoch(epoch, positions[inside])
        return rows

    def _rows_of_epoch(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        tail = self._tail_place(epoch)
        shuffled = np.empty_like(positions)
        for window, inside in groups_of(self._place(positions, tail) // self._window_places):
            start, stop = self._window(window, tail)
            shuffled[inside] = start + self._within.places(positions[inside] - start, stop - start, epoch, window)
        places = self._place(shuffled, tail)
        blocks = np.full_like(places, self._num_blocks)
        whole = places != tail
        ranked = places[whole] - (places[whole] > tail)
        blocks[whole] = self._blocks.places(ranked, self._num_blocks, epoch)
        return np.asarray(blocks * self.block_rows + shuffled - self._start(places, tail))

    @cached_property
    def _within(self) -> Shuffle:
        return Shuffle(self.seed, "rows of a window", self.source)

    @cached_property
    def _blocks(self) -> Shuffle:
        return Shuffle(self.seed, "blocks", self.source)

    @cached_property
    def _tails(self) -> Shuffle:
        return Shuffle(self.seed, "tail", self.source)

    @property
    def _num_blocks(self) -> int:
        """Whole blocks."""
        return self.num_rows // self.block_rows

    @property
    def _tail_rows(self) -> int:
        return self.num_rows % self.block_rows

    @property
    def _num_places(self) -> int:
        """Blocks, the short one included."""
        return self._num_blocks + (self._tail_rows > 0)

    @cached_property
    def _window_places(self) -> int:
        """Blocks of a window: windows as even as whole blocks allow, so that the last one is not a single block."""
        windows = -(-self._num_places // self.window_blocks)
        return -(-self._num_places // windows)

    def _tail_place(self, epoch: int) -> int:
        """Where the short block stands among the others; after all of them, where there is none."""
        return self._tails.place(0, self._num_places, epoch) if self._tail_rows else self._num_places

    def _place(self, position: Any, tail: int) -> Any:
        """The block's place that a position (or each of an array) of an epoch falls in."""
        after = position >= tail * self.block_rows + self._tail_rows
        return (position - after * self._tail_rows) // self.block_rows + after

    def _start(self, place: Any, tail: int) -> Any:
        """The first position of a block's place."""
        return place * self.block_rows - (place > tail) * (self.block_rows - self._tail_rows)

    def _window(self, window: int, tail: int) -> tuple[int, int]:
        """Positions [start, stop) of a window."""
        last = min((window + 1) * self._window_places, self._num_places)
        stop = self.num_rows if last == self._num_places else self._start(last, tail)
        return self._start(window * self._window_places, tail), stop


def groups_of(labels: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yields each label and the places that have it."""
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, starts[1:]), strict=True)
