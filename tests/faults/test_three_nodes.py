"""Nodes that go and come, on a real Ray cluster (FAULTS: a node dies; another world size)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.three_nodes import play, play_a_hang
from tests.support.tolerances import TWENTY_STEPS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_go_and_come_and_losses_stay_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    found = play(tmp_path, "optimizer.min_lr_fraction=1.0")
    assert [recovery.ranks for recovery in found.recoveries] == [3, 3, 2, 3]
    assert all(recovery.lost_steps <= 20 for recovery in found.recoveries)  # as many as lie between two checkpoints
    assert "expert 2" in found.recoveries[2].layout and "expert 3" in found.recoveries[3].layout
    assert found.losses == pytest.approx(found.undisturbed, rel=TWENTY_STEPS)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_worker_that_hangs_is_started_again_and_losses_stay_bit_for_bit(tmp_path: Path) -> None:
    found = play_a_hang(tmp_path, limit=5.0)
    assert found.recoveries[0].lost_steps <= 20
    assert "did not answer" in (tmp_path / "run" / "ranks" / "stack-00001.txt").read_text()
    assert found.losses == found.undisturbed
