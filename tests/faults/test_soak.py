"""Ten minutes of random faults (FAULTS: chaos soak)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.test_checkpoints import answer_of, can_mount


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not can_mount(), reason="this user may mount no tmpfs of their own")
def test_ten_minutes_of_faults_end_with_the_losses_of_a_clean_run(tmp_path: Path) -> None:
    command = ("unshare", "-rm", sys.executable, "-m", "tests.faults.soak", "600", "24", str(tmp_path))
    found = answer_of(*command, seconds=2300)
    assert len(found["faults"]) >= 8, found["faults"]
    assert found["losses"] == found["undisturbed"] and len(found["losses"]) > 500
    assert found["effective_time"]["share"] >= 0.80, found["effective_time"]
