"""Rows of whole documents: best-fit packing, and how a run opens the rows that its config asks for.

A row of length S is a context token and S places for targets. Within each shard, a document longer than S is cut into
pieces of S tokens, each a row of its own, and a rest; rests and whole documents are then put, longest first, each into
the fullest row that has room for it. What is left of a row is `PADDING`. So every token is a target exactly once, as
with concatenated rows, and a document is cut only where it is longer than a row.

    S = 6, documents   a a a a a a a a .   b b .   c c c .   d .          (. is end-of-text, 9, 3, 4 and 2 tokens)
    pieces             a a a a a a | a a .   b b .   c c c .   d .
    longest first      c c c .   into a new row       a a .   into another: c leaves room for 2
                       b b .     beside a a .         d .     beside c c c .
    row 0              . | a a a a a a                the context is the token before; end-of-text where a document
    row 1              a | a a . b b .                begins
    row 2              . | c c c . d .

Rows stand in the order in which their first pieces stand in the text, and a rest of a cut document begins its row.
Source: Ding et al. 2024 (Fewer Truncations Improve Language Modeling), section 3; there over the whole corpus, here in
each shard by itself, so that a row reads one shard.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.lengths import LengthFile
from data_pipeline.manifest import read_manifest
from data_pipeline.order import BLOCK_TOKENS
from data_pipeline.shards import CACHE_BYTES, TokenSplit
from moe_dist.config import Config

PADDING = -100  # in a row in place of a token; what training reads as no target
_PLANS_KEPT = 32


@dataclass(frozen=True)
class RowPlan:
    """The rows of one shard.

    Attributes:
        start_P: Where each piece begins in the shard, in the order of rows and within a row: [pieces] int64.
        stop_P: Where it ends.
        first_R: The first piece of each row, and the number of pieces: [rows + 1] int64.
    """

    start_P: NDArray[np.int64]
    stop_P: NDArray[np.int64]
    first_R: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return len(self.first_R) - 1

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(start, stop) of the pieces of a row, in order."""
        here = slice(self.first_R[row], self.first_R[row + 1])
        return list(zip(self.start_P[here].tolist(), self.stop_P[here].tolist(), strict=True))


def plan_rows(lengths: NDArray[np.int64], room: int) -> RowPlan:
    """Packs the documents of a shard.

    Args:
        lengths: Tokens of each document, at least 1.
        room: Targets of a row.
    """
    end_D = np.cumsum(lengths, dtype=np.int64)
    whole_D, rest_D = np.divmod(lengths, room)
    # Pieces that fill a row: number n of a document begins n * room behind its beginning.
    number = np.arange(int(whole_D.sum())) - np.repeat(np.cumsum(whole_D) - whole_D, whole_D)
    full = np.repeat(end_D - lengths, whole_D) + number * room
    (document,) = np.nonzero(rest_D)
    document = document[np.argsort(-rest_D[document], kind="stable")]
    size, row = rest_D[document], np.array(best_fit(rest_D[document].tolist(), room), dtype=np.int64)
    start = np.concatenate([full, end_D[document] - size])
    stop = start + np.concatenate([np.full(len(full), room, dtype=np.int64), size])
    row = np.concatenate([np.arange(len(full)), row + len(full)])
    begins = np.concatenate([np.ones(len(full), dtype=bool), whole_D[document] == 0])
    # Of each row the first piece in the text; rows are numbered by it.
    earliest_R = np.full(int(row.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest_R, row, start)
    place_R = np.empty_like(earliest_R)
    place_R[np.argsort(earliest_R)] = np.arange(len(earliest_R))
    row = place_R[row]
    order = np.lexsort((start, begins, row))  # a rest, whose beginning is elsewhere, before whole documents
    first_R = np.searchsorted(row[order], np.arange(len(earliest_R) + 1))
    return RowPlan(start[order], stop[order], first_R)


def best_fit(sizes: Sequence[int], room: int) -> list[int]:
    """The row that each piece goes to: the one with the least room that holds it, or a new one.

    Args:
        sizes: Of the pieces, longest first; from 1 to `room`.
        room: Of an empty row.
    """
    rows_of: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the room that they have left
    with_room, count = 0, 0  # bit r is set where some row has exactly r left
    chosen = []
    for size in sizes:
        fitting = with_room >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = rows_of[left].pop()
            if not rows_of[left]:
                with_room ^= 1 << left
        else:
            row, left, count = count, room, count + 1
        chosen.append(row)
        if left > size:
            rows_of[left - size].append(row)
            with_room |= 1 << left - size
    return chosen


class PackedSplit:
    """A split whose rows hold whole documents; read as a `TokenSplit` is. Not shared between threads.

    Rows of a length are counted when it is first asked for, from the lengths of all documents; plans are made again for
    the shards that are read, and the latest are kept.

    Args:
        split: The tokens.

    Raises:
        DataError: The build has no lengths of documents, or they are damaged.
    """

    def __init__(self, split: TokenSplit) -> None:
        self.split = split
        self._lengths = LengthFile(split.folder, split.name, split.manifest)
        self._firsts = [0, *accumulate(shard.tokens for shard in split.shards)]
        self._ends: dict[int, list[int]] = {}
        self._plans: OrderedDict[tuple[int, int], RowPlan] = OrderedDict()

    @property
    def name(self) -> str:
        return self.split.name

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole split, each of which is a target once."""
        return self.split.num_tokens

    @property
    def content_sha256(self) -> str:
        """Identity of the tokens and of how they are packed."""
        return hashlib.sha256(f"best_fit:{self.split.content_sha256}".encode()).hexdigest()

    def num_rows(self, sequence_length: int) -> int:
        """Rows of S targets, padding included."""
        ends = self._row_ends(sequence_length)
        return ends[-1] if ends else 0

    def row(self, i: int, sequence_length: int) -> NDArray[np.int64]:
        """Row i: [S + 1] ids, `PADDING` at the end.

        Raises:
            DataError: A shard is damaged.
            IndexError: There is no such row.
        """
        ends = self._row_ends(sequence_length)
        if not 0 <= i < self.num_rows(sequence_length):
            raise IndexError(f"row {i} of {self.num_rows(sequence_length)}")
        number = bisect_right(ends, i)
        pieces = self._plan(number, sequence_length).pieces(i - (ends[number - 1] if number else 0))
        row, first = np.full(sequence_length + 1, PADDING, dtype=np.int64), self._firsts[number]
        begin = pieces[0][0] + first
        # What stands before a shard is the end of a text, or nothing: both are written as end-of-text.
        row[0] = self.split.tokens(begin - 1, begin)[0] if pieces[0][0] else self.split.manifest.end_of_text
        filled = 1
        for start, stop in pieces:
            row[filled : filled + stop - start] = self.split.tokens(first + start, first + stop)
            filled += stop - start
        return row

    def all_rows(self, sequence_length: int, rows_per_batch: int = 256) -> Iterator[NDArray[np.int64]]:
        """Every row once, in order, in arrays [<= rows_per_batch, S + 1]."""
        count = self.num_rows(sequence_length)
        for first in range(0, count, rows_per_batch):
            last = min(first + rows_per_batch, count)
            yield np.stack([self.row(i, sequence_length) for i in range(first, last)])

    def verify(self) -> None:
        """Checks the hash of every shard now; that of the lengths is checked already.

        Raises:
            DataError: The first shard that is missing or damaged.
        """
        self.split.verify()

    def _row_ends(self, sequence_length: int) -> list[int]:
        """Rows up to and with each shard."""
        if sequence_length not in self._ends:
            counts = (self._make_plan(number, sequence_length).num_rows for number in range(len(self.split.shards)))
            self._ends[sequence_length] = list(accumulate(counts))
        return self._ends[sequence_length]

    def _plan(self, number: int, sequence_length: int) -> RowPlan:
        key = (number, sequence_length)
        if key not in self._plans:
            self._plans[key] = self._make_plan(number, sequence_length)
            if len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _make_plan(self, number: int, sequence_length: int) -> RowPlan:
        return plan_rows(self._lengths.of_shard(self.split.places[number]), sequence_length)


def open_rows(
    config: Config, folder: Path, name: str, cache_bytes: int = CACHE_BYTES, source: str | None = None
) -> TokenSplit | PackedSplit:
    """The rows of a split as the config packs them.

    Args:
        config: `data.packing` and `data.damaged_shards` are used.
        folder: The build.
        name: `train` or `heldout`.
        cache_bytes: Decoded tokens are kept up to this size.
        source: Only the text of this source; None takes all.

    Raises:
        DataError: The build has no usable manifest, or a file of it is missing or damaged.
    """
    # What is held out is a measure, which must not change: it is read as a whole or not at all.
    defers = name == "train" and config.data.damaged_shards == "quarantine"
    split = TokenSplit(folder, name, cache_bytes, source, defers)
    return PackedSplit(split) if config.data.packing == "best_fit" else split


def open_sources(config: Config, folder: Path) -> dict[str, TokenSplit | PackedSplit]:
    """The training rows of each source of a build, which no row crosses; of a build without sources, of all its text.

    The decoded tokens of a window of the order and a little more are kept: what is read again is read from memory.

    Raises:
        DataError: The build has no usable manifest, or a file of it is missing or damaged.
    """
    manifest = read_manifest(folder)
    id_bytes = 2 if manifest.tokenizer_size <= 2**16 else 4
    # Blocks do not begin where batches of a shard do: a window touches at most half as many again.
    cache_bytes = id_bytes * (3 * config.data.shuffle_window_tokens // 2 + 2 * BLOCK_TOKENS)
    return {name: open_rows(config, folder, "train", cache_bytes, name) for name in manifest.sources or ("",)}


def separating_token(config: Config, folder: Path) -> int | None:
    """The id that ends a document of a build, where documents do not see each other; None where they are joined."""
    return read_manifest(folder).end_of_text if config.data.documents == "separate" else None
