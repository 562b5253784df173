"""Ranks as local processes: their results, their errors, their environment, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.failure import RankCrash
from launch.local import run_local
from moe_dist.config import Config, parse_config
from moe_dist.errors import DataError, TrainingFault
from tests.launch.conftest import alive, behave, descendants, events, wait_until
from tests.launch.driver import WORKER

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def config(run_dir: Path) -> Config:
    return parse_config({"run": {"dir": str(run_dir)}})


def test_run_local_two_ranks_return_the_summary_and_have_their_environment(config: Config, run_dir: Path) -> None:
    behave(run_dir, steps=3)
    (run_dir / "stop-requested").touch()  # left behind by an earlier run
    before = dict(os.environ)
    summary = run_local(config, run_dir, 2, WORKER)
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert len({worker["pid"] for worker in summary["workers"]}) == 2
    assert int(summary["environment"]["MALLOC_TRIM_THRESHOLD_"]) >= 1 << 30
    assert summary["environment"]["THP_MEM_ALLOC_ENABLE"] == "1"
    assert summary["environment"]["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert dict(os.environ) == before


def test_run_local_named_error_travels_as_itself_and_ends_the_others(config: Config, run_dir: Path) -> None:
    behave(run_dir, steps=1000, **{"raise": {"rank": 1, "step": 3, "kind": "DataError"}})
    with pytest.raises(DataError) as caught:
        run_local(config, run_dir, 2, WORKER)
    error = caught.value
    assert (error.where, error.value, error.rule) == ("shard 7", "flipped byte", "shards keep their checksum")
    [start] = events(run_dir, "start")
    assert not any(alive(worker["pid"]) for worker in start["workers"])


def test_run_local_bug_in_a_rank_shows_its_rank_and_traceback(config: Config, run_dir: Path) -> None:
    behave(run_dir, steps=1000, **{"raise": {"rank": 1, "step": 3, "kind": "bug"}})
    with pytest.raises(RankCrash, match=r"rank 1 raised ZeroDivisionError: a bug in the model(.|\n)*_misbehave"):
        run_local(config, run_dir, 2, WORKER)


@pytest.mark.timeout(100)  # its peers must not wait for the collective's time-out of 300 s
def test_run_local_killed_rank_is_named_and_ends_the_others(config: Config, run_dir: Path) -> None:
    behave(run_dir, steps=1000, die={"rank": 1, "step": 3})
    with pytest.raises(TrainingFault) as caught:
        run_local(config, run_dir, 2, WORKER)
    assert (caught.value.where, caught.value.value) == ("rank 1", "killed by SIGKILL")


def test_run_local_parent_killed_leaves_no_process(start_driver: Start, run_dir: Path) -> None:
    behave(run_dir, steps=10_000, step_seconds=0.05)
    driver = start_driver("local")
    wait_until(lambda: events(run_dir, "step"), 60, "the first step")
    children = descendants(driver.pid)
    assert len(children) >= 2
    driver.kill()
    wait_until(lambda: not any(map(alive, children)), 5, "the end of the ranks")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_local_signal_to_the_group_stops_after_a_step(start_driver: Start, run_dir: Path, number: int) -> None:
    behave(run_dir, steps=10_000, step_seconds=0.05)
    driver = start_driver("local")
    wait_until(lambda: events(run_dir, "step"), 60, "the first step")
    os.killpg(driver.pid, number)
    out, err = driver.communicate(timeout=15)
    assert (out.strip(), driver.returncode) == ("interrupted", 0)
    assert "press Ctrl-C again" in err
    assert not (run_dir / "stop-requested").exists()


def test_run_local_second_ctrl_c_ends_at_once(start_driver: Start, run_dir: Path) -> None:
    behave(run_dir, steps=10, step_seconds=60)  # no step ends, so the first request is not seen
    driver = start_driver("local")
    wait_until(lambda: events(run_dir, "start"), 60, "the start")
    children = descendants(driver.pid)
    os.killpg(driver.pid, signal.SIGINT)
    wait_until((run_dir / "stop-requested").exists, 5, "the stop file")
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=5) == 130
    wait_until(lambda: not any(map(alive, children)), 5, "the end of the ranks")
