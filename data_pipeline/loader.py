"""The batches of one rank, from a cursor that knows no rank count.

Sample g of a run is a row of the training split, decided by the seed alone. Step s takes samples [s*B, (s+1)*B) for a
global batch of B, and each rank a contiguous part of them. The order has no end, so all ranks take the same number of
steps whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.packing import PackedSplit
from data_pipeline.permutation import row_order
from data_pipeline.shards import TokenSplit
from moe_dist.errors import CheckpointError, ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch.

    Attributes:
        rows: [n, S + 1] int64; inputs are `rows[:, :-1]`, targets `rows[:, 1:]`. n may be 0.
        first_sample: Position in the global order of the first row (where it would be, if there is none).
    """

    rows: NDArray[np.int64]
    first_sample: int


@dataclass
class BatchLoader:
    """An endless iterator of `Batch`.

    Attributes:
        split: The training split.
        sequence_length: S, in tokens.
        global_batch: Sequences in one step, over all ranks.
        seed: Seed of the order.
        rank: This rank.
        world_size: Ranks that share each batch; some may get one row less than others, or none.
        cursor: Samples consumed by all ranks so far.

    Raises:
        ConfigError: A number is out of range.
        DataError: The split fills no row.
    """

    split: TokenSplit | PackedSplit
    sequence_length: int
    global_batch: int
    seed: int
    rank: int = 0
    world_size: int = 1
    cursor: int = 0

    def __post_init__(self) -> None:
        _check_positive("data.sequence_length_tokens", self.sequence_length)
        _check_positive("train.global_batch_sequences", self.global_batch)
        part_of(0, self.rank, self.world_size)
        if self.cursor < 0:
            raise ConfigError("cursor", self.cursor, "samples consumed so far are at least 0", "cursor=0")
        if not self.split.num_rows(self.sequence_length):
            raise DataError(
                f"{self.split.name} split",
                f"{self.split.num_tokens} tokens",
                f"it fills at least one row of {self.sequence_length} + 1 tokens",
                "more text, or a smaller data.sequence_length_tokens",
            )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first, last = part_of(self.global_batch, self.rank, self.world_size)
        num_rows = self.split.num_rows(self.sequence_length)
        rows = np.empty((last - first, self.sequence_length + 1), dtype=np.int64)
        for place in range(last - first):
            row = row_order(self.seed, num_rows, self.cursor + first + place)
            rows[place] = self.split.row(row, self.sequence_length)
        batch = Batch(rows, self.cursor + first)
        self.cursor += self.global_batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on with the next sample; the same on every rank."""
        return {"cursor": self.cursor, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; rank, ranks and global batch may be others.

        Raises:
            CheckpointError: The state belongs to other tokens, another row length or another seed.
        """
        fixes = {
            "content_sha256": "point data.* at the data the run began with, or start a new run",
            "sequence_length": f"data.sequence_length_tokens={state.get('sequence_length')}, or start a new run",
            "seed": f"seed={state.get('seed')}, or start a new run",
        }
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise CheckpointError(
                    f"data order: {name}", state.get(name), f"it is that of this run: {mine}", fixes[name]
                )
        cursor = state.get("cursor")
        if not isinstance(cursor, int) or cursor < 0:
            raise CheckpointError(
                "data order: cursor", cursor, "samples consumed so far, at least 0", "start a new run"
            )
        self.cursor = cursor

    def _identity(self) -> dict[str, Any]:
        return {
            "content_sha256": self.split.content_sha256,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
        }


def heldout_rows(
    split: TokenSplit | PackedSplit, sequence_length: int, count: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """This rank's part of `count` rows spread evenly over a split (all of them, if there are fewer): [n, S + 1].

    Spread, because the documents at the start of a split need not be like the others.

    Raises:
        ConfigError: A number is out of range.
        DataError: A shard is damaged.
    """
    _check_positive("data.sequence_length_tokens", sequence_length)
    available = split.num_rows(sequence_length)
    taken = min(count, available)
    first, last = part_of(taken, rank, world_size)
    rows = np.empty((last - first, sequence_length + 1), dtype=np.int64)
    for place in range(last - first):
        rows[place] = split.row((first + place) * available // taken, sequence_length)
    return rows


def part_of(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [first, last) of `count` things that a rank takes; parts differ by at most one.

    Raises:
        ConfigError: There is no such rank.
    """
    _check_positive("world_size", world_size)
    if not 0 <= rank < world_size:
        raise ConfigError("rank", rank, f"a rank is in [0, {world_size})", "rank=0")
    return count * rank // world_size, count * (rank + 1) // world_size


def _check_positive(where: str, value: int) -> None:
    if value < 1:
        raise ConfigError(where, value, "must be at least 1", f"{where}=1")
