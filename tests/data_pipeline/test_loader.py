from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import Batch, BatchLoader, TrainingRows, heldout_rows, part_of
from data_pipeline.mixture import each_once
from data_pipeline.run_order import RunOrder
from data_pipeline.shards import TokenSplit
from moe_dist.errors import CheckpointError, ConfigError

S = 32


@pytest.fixture(scope="module")
def train(built: Path) -> TokenSplit:
    return TokenSplit(built, "train")


def training_of(split: TokenSplit, seed: int = 5) -> TrainingRows:
    """One source without a name, in windows of a quarter of it."""
    rows = {"": split.num_rows(S)}
    return TrainingRows({"": split}, RunOrder(seed, rows, each_once(rows), S, split.num_tokens // 4))


def loader_of(split: TokenSplit, *settings: int, **more: int) -> BatchLoader:
    return BatchLoader(training_of(split), *settings, **more)


def _joined(split: TokenSplit, global_batch: int, world_size: int, cursor: int = 0) -> tuple[np.ndarray, list[Batch]]:
    parts = [next(loader_of(split, global_batch, rank, world_size, cursor)) for rank in range(world_size)]
    return np.concatenate([part.rows for part in parts]), parts


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("global_batch", [1, 5, 16])
def test_batch_of_all_ranks_joined_is_the_global_batch(train: TokenSplit, world_size: int, global_batch: int) -> None:
    whole = next(loader_of(train, global_batch, cursor=11))
    rows, parts = _joined(train, global_batch, world_size, cursor=11)
    assert np.array_equal(rows, whole.rows)
    assert [p.first_sample for p in parts] == [11 + global_batch * r // world_size for r in range(world_size)]
    assert all(part.rows.shape[1:] == (S + 1,) and part.rows.dtype == np.int64 for part in parts)


def test_batch_of_a_rank_without_a_share_is_empty_and_the_next_step_comes(train: TokenSplit) -> None:
    loader = loader_of(train, 2, rank=0, world_size=7)
    for step in range(3):
        batch = next(loader)
        assert batch.rows.shape == (0, S + 1)
        assert batch.first_sample == 2 * step


def test_batches_are_the_rows_of_the_order(train: TokenSplit) -> None:
    batch = next(loader_of(train, 4, cursor=8))
    for place, row in enumerate(batch.rows):
        assert np.array_equal(row, train.row(training_of(train).locate(8 + place)[1], S))


def test_batches_of_an_epoch_have_each_row_once_though_the_batch_does_not_divide_it(train: TokenSplit) -> None:
    num_rows = train.num_rows(S)
    loader = loader_of(train, 7)
    rows = np.concatenate([next(loader).rows for _ in range(num_rows // 7 + 2)])[:num_rows]
    every = np.concatenate(list(train.all_rows(S)))
    assert sorted(map(bytes, rows)) == sorted(map(bytes, every))


def test_ranks_take_equally_many_steps_past_the_end_of_the_split(train: TokenSplit) -> None:
    steps = 2 * train.num_rows(S) // 9 + 5
    loaders = [loader_of(train, 9, rank, 2) for rank in range(2)]
    for loader in loaders:
        for _ in range(steps):
            next(loader)
    assert {loader.cursor for loader in loaders} == {9 * steps}


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(0, 30), old=st.integers(1, 5), new=st.integers(1, 5))
def test_resume_at_any_step_with_other_ranks_goes_on_with_the_same_batches(
    train: TokenSplit, steps: int, old: int, new: int
) -> None:
    unbroken = loader_of(train, 6)
    stopped = loader_of(train, 6, rank=old - 1, world_size=old)
    for _ in range(steps):
        next(unbroken)
        next(stopped)
    parts = []
    for rank in range(new):
        resumed = loader_of(train, 6, rank, new)
        resumed.load_state_dict(stopped.state_dict())
        parts.append(next(resumed).rows)
    assert np.array_equal(np.concatenate(parts), next(unbroken).rows)


def test_resume_with_another_global_batch_takes_the_next_sample(train: TokenSplit) -> None:
    first = loader_of(train, 6)
    next(first)
    second = loader_of(train, 4)
    second.load_state_dict(first.state_dict())
    assert next(second).first_sample == 6


@pytest.mark.parametrize(
    "name", ["order", "sequence_length", "seed", "content_sha256", "mixture_sha256", "window_blocks", "cursor"]
)
def test_resume_from_a_state_of_another_order_names_what_differs(train: TokenSplit, name: str) -> None:
    loader = loader_of(train, 6)
    for value in (None, -1, "x"):
        with pytest.raises(CheckpointError, match=f"data order: {name}"):
            loader.load_state_dict({**loader.state_dict(), name: value})
    assert loader.cursor == 0


def test_resume_with_a_copy_of_the_build_is_allowed(train: TokenSplit, built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "copy")
    other = loader_of(TokenSplit(tmp_path / "copy", "train"), 6)
    other.load_state_dict(loader_of(train, 6, cursor=12).state_dict())
    assert other.cursor == 12


def test_loader_of_a_rank_or_size_out_of_range_is_an_error(train: TokenSplit) -> None:
    for change in ({"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 0}, {"cursor": -1}):
        with pytest.raises(ConfigError):
            loader_of(train, 6, **change)
    with pytest.raises(ConfigError, match="global_batch"):
        loader_of(train, 0)


@given(st.integers(0, 1000), st.integers(1, 50))
def test_parts_are_contiguous_and_differ_by_at_most_one(count: int, world_size: int) -> None:
    parts = [part_of(count, rank, world_size) for rank in range(world_size)]
    assert [parts[0][0], parts[-1][1]] == [0, count]
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_heldout_rows_of_all_ranks_are_spread_over_the_split(built: Path, world_size: int) -> None:
    split = TokenSplit(built, "heldout")
    parts = [heldout_rows(split, S, 10, rank, world_size) for rank in range(world_size)]
    every = np.concatenate(list(split.all_rows(S)))
    assert len(every) > 20
    assert np.array_equal(np.concatenate(parts), every[[place * len(every) // 10 for place in range(10)]])
    assert len(heldout_rows(split, S, 10**9)) == split.num_rows(S)
