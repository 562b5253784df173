"""The batches of one rank, from a cursor that knows no rank count.

Sample g of a run is a row of a source, decided by the seed alone (`run_order.py`). Step s takes samples [s*B, (s+1)*B)
for a global batch of B, and each rank a contiguous part of them, so all ranks take the same number of steps whatever
the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.mixture import stages_of
from data_pipeline.packing import PADDING, PackedSplit, open_sources
from data_pipeline.run_order import RunOrder
from data_pipeline.shards import TokenSplit
from moe_dist.config import Config
from moe_dist.errors import CheckpointError, ConfigError, DataError, ShardError


@dataclass(frozen=True)
class LeftOut:
    """A row that is left empty in its place, since it has tokens of a damaged shard.

    Attributes:
        sample: Its place in the run.
        source: Its source; empty where the build has none.
        row: Its number in the source.
        shard: The damaged file.
        reason: What is wrong with it.
    """

    sample: int
    source: str
    row: int
    shard: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch.

    Attributes:
        rows: [n, S + 1] int64; inputs are `rows[:, :-1]`, targets `rows[:, 1:]`. n may be 0.
        first_sample: Position in the global order of the first row (where it would be, if there is none).
        left_out: Those of the rows that are nothing but padding, as `data.damaged_shards=quarantine` asks.
    """

    rows: NDArray[np.int64]
    first_sample: int
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class TrainingRows:
    """The samples of a run as rows of tokens.

    Attributes:
        sources: The training split of each source, in the order of the build.
        order: Which row each sample is.
        quarantine: Rows of damaged shards are left empty. All sizes are the manifest's, so no other row moves.
    """

    sources: Mapping[str, TokenSplit | PackedSplit]
    order: RunOrder
    quarantine: bool = False

    def rows(self, first: int, end: int) -> NDArray[np.int64]:
        """Samples [first, end): [end - first, S + 1]; see `batch`."""
        return self.batch(first, end).rows

    def batch(self, first: int, end: int) -> Batch:
        """Samples [first, end), and which of them are left empty.

        Raises:
            ShardError: A shard is damaged, and there is no quarantine.
        """
        length, splits = self.order.sequence_length, list(self.sources.values())
        rows = np.empty((end - first, length + 1), dtype=np.int64)
        left_out = []
        sources, numbers = self.order.locate_range(first, end)
        for place, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True)):
            try:
                rows[place] = splits[source].row(number, length)
            except ShardError as error:
                if not self.quarantine:
                    raise
                rows[place] = PADDING
                name, shard = self.order.mixture.sources[source], Path(error.where).name
                left_out.append(LeftOut(first + place, name, number, shard, str(error.value)))
        return Batch(rows, first, tuple(left_out))

    def locate(self, sample: int) -> tuple[str, int]:
        """(name of the source, its row) of a sample; the name is empty where the build has no sources."""
        source, row = self.order.locate(sample)
        return self.order.mixture.sources[source], row

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint is compared by: the order, and the tokens of every source."""
        return {
            "content_sha256": {name: split.content_sha256 for name, split in self.sources.items()},
            **self.order.identity,
        }


def open_training(config: Config, folder: Path, steps: int | None = None) -> TrainingRows:
    """The training rows of a build in the order that the configuration asks for.

    Args:
        config: `seed` and `data.*` are used.
        folder: The build.
        steps: Updates of the run, for which the mixture must last.

    Raises:
        ConfigError: The mixture ends before the run.
        DataError: A source that the mixture asks for fills no row, or a file of the build is missing or damaged.
    """
    data = config.data
    length = data.sequence_length_tokens
    sources = open_sources(config, folder)
    rows = {name: split.num_rows(length) for name, split in sources.items()}
    _check_filled(sources if not data.mixture else {}, length)
    stages = stages_of(data.mixture, rows, length)
    order = RunOrder(config.seed, rows, stages, length, data.shuffle_window_tokens)
    samples, batch = order.mixture.num_samples, config.train.global_batch_sequences
    if steps is not None and samples is not None and samples < steps * batch:
        raise ConfigError(
            "data.mixture",
            f"{samples} rows in all stages",
            f"it lasts for train.steps={steps} updates of {batch} rows: {steps * batch} rows",
            f"train.steps={samples // batch} or less, or a last stage without `tokens`",
        )
    return TrainingRows(sources, order, data.damaged_shards == "quarantine")


def _check_filled(sources: Mapping[str, TokenSplit | PackedSplit], sequence_length: int) -> None:
    for name, split in sources.items():
        if not split.num_rows(sequence_length):
            raise DataError(
                f"data.sources.{name}" if name else f"{split.name} split",
                f"{split.num_tokens} tokens",
                f"it fills at least one row of {sequence_length} + 1 tokens",
                "more text, or a smaller data.sequence_length_tokens" + (", or no such source" if name else ""),
            )


@dataclass
class BatchLoader:
    """An iterator of `Batch`, endless where the mixture is.

    Attributes:
        training: The samples.
        global_batch: Sequences in one step, over all ranks.
        rank: This rank.
        world_size: Ranks that share each batch; some may get one row less than others, or none.
        cursor: Samples consumed by all ranks so far.

    Raises:
        ConfigError: A number is out of range.
    """

    training: TrainingRows
    global_batch: int
    rank: int = 0
    world_size: int = 1
    cursor: int = 0

    def __post_init__(self) -> None:
        _check_positive("train.global_batch_sequences", self.global_batch)
        part_of(0, self.rank, self.world_size)
        if self.cursor < 0:
            raise ConfigError("cursor", self.cursor, "samples consumed so far are at least 0", "cursor=0")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        samples = self.training.order.mixture.num_samples
        if samples is not None and self.cursor + self.global_batch > samples:
            raise StopIteration
        first, last = part_of(self.global_batch, self.rank, self.world_size)
        batch = self.training.batch(self.cursor + first, self.cursor + last)
        self.cursor += self.global_batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on with the next sample; the same on every rank."""
        return {"cursor": self.cursor, **self.training.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; rank, ranks and global batch may be others.

        Raises:
            CheckpointError: The state belongs to other tokens, another mixture, row length, window or seed.
        """
        for name, mine in self.training.identity.items():
            if state.get(name) != mine:
                found, rule = state.get(name), f"it is that of this run: {mine}"
                raise CheckpointError(f"data order: {name}", found, rule, _fix(name, found))
        cursor = state.get("cursor")
        if not isinstance(cursor, int) or cursor < 0:
            raise CheckpointError(
                "data order: cursor", cursor, "samples consumed so far, at least 0", "start a new run"
            )
        self.cursor = cursor


def _fix(name: str, found: Any) -> str:
    return {
        "order": "go on with the version of moe_dist that began the run, or start a new run",
        "content_sha256": "point data.* at the data the run began with, or start a new run",
        "mixture_sha256": "give data.sources and data.mixture as they were, or start a new run",
        "sequence_length": f"data.sequence_length_tokens={found}, or start a new run",
        "window_blocks": "give data.shuffle_window_tokens as it was, or start a new run",
        "seed": f"seed={found}, or start a new run",
    }[name]


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
