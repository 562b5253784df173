"""Batches made ahead: the same ones, a cursor of what was handed out, errors where they belong, threads that end."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import BatchLoader, open_training
from data_pipeline.manifest import read_manifest
from data_pipeline.prefetch import Prefetch
from moe_dist.config import Config
from moe_dist.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def config(built: Path, texts: Path) -> Config:
    from tests.data_pipeline.conftest import _configure

    return _configure(texts, built.parent)


def threads() -> int:
    return sum(thread.name == "batches made ahead" for thread in threading.enumerate())


@settings(deadline=None, max_examples=20)
@given(ahead=st.integers(0, 5), steps=st.integers(0, 12), more=st.integers(1, 4))
def test_prefetch_gives_the_loaders_batches_and_goes_on_from_any_state(
    built: Path, config: Config, ahead: int, steps: int, more: int
) -> None:
    plain = BatchLoader(open_training(config, built), 6)
    batches = Prefetch(BatchLoader(open_training(config, built), 6), ahead)
    for _ in range(steps):
        assert np.array_equal(next(batches).rows, next(plain).rows)
        assert batches.state_dict() == plain.state_dict()
    resumed = Prefetch(BatchLoader(open_training(config, built), 6), ahead)
    next(resumed)
    resumed.load_state_dict(batches.state_dict())
    for _ in range(more):
        assert np.array_equal(next(resumed).rows, next(plain).rows)
    batches.close()
    resumed.close()
    assert threads() == 0


def test_prefetch_is_ahead_while_nothing_is_asked_for_and_no_further(built: Path, config: Config) -> None:
    loader = BatchLoader(open_training(config, built), 6)
    batches = Prefetch(loader, 3)
    next(batches)
    while loader.cursor < 6 * 4:
        time.sleep(0.01)
    time.sleep(0.1)
    assert loader.cursor == 6 * 4 and batches.state_dict()["cursor"] == 6
    batches.close()


def test_prefetch_raises_what_goes_wrong_at_its_batch_and_ends_its_thread(
    built: Path, config: Config, tmp_path: Path
) -> None:
    shutil.copytree(built, tmp_path / "copy")
    batches = Prefetch(BatchLoader(open_training(config, tmp_path / "copy"), 4), 2)
    victim = tmp_path / "copy" / read_manifest(built).splits["train"][1].file
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-200] + bytes(byte ^ 1 for byte in whole[-200:-199]) + whole[-199:])
    with pytest.raises(DataError, match=victim.name):
        for _ in range(1000):
            next(batches)
    before = batches.state_dict()["cursor"]
    assert threads() == 0
    victim.write_bytes(whole)
    assert next(batches).first_sample == before  # mended, it goes on with the batch that failed
    batches.close()


def test_prefetch_of_a_state_of_another_order_is_refused(built: Path, config: Config) -> None:
    batches = Prefetch(BatchLoader(open_training(config, built), 4), 2)
    with pytest.raises(CheckpointError, match="seed"):
        batches.load_state_dict({**batches.state_dict(), "seed": 99})
