"""What a checkpoint knows of the data that a run reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_pipeline.build import build
from data_pipeline.manifest import TOKENIZER_NAME
from launch.batches import RankBatches
from moe_dist.errors import CheckpointError
from moe_dist.parallel.layout import layout_of
from tests.data_pipeline.test_build import configure
from tests.support.one_rank import one_rank
from tests.support.parallel_step import mesh_of


def test_batches_go_on_only_with_the_tokenizer_they_began_with(tmp_path: Path) -> None:
    for number in range(8):
        words = " ".join(str(n * (number + 1)) for n in range(3000))
        (tmp_path / f"{number}.txt").write_text(f"text number {number}: {words}")
    config = configure(tmp_path, tmp_path / "data", holdout_fraction=0.2)
    built = build(config, False)
    with one_rank():
        batches = RankBatches(config, built, mesh_of(layout_of(config, 1, None)))
    next(batches)
    state = batches.state_dict()
    assert state["tokenizer_sha256"] == hashlib.sha256((built / TOKENIZER_NAME).read_bytes()).hexdigest()
    batches.load_state_dict(state)
    before_that_was_said = {name: value for name, value in state.items() if name != "tokenizer_sha256"}
    batches.load_state_dict(before_that_was_said)
    with pytest.raises(CheckpointError, match=r"tokenizer[^$]*0000"):
        batches.load_state_dict({**state, "tokenizer_sha256": "0000"})
