"""A rank that hangs is named, its stack is saved; a rank that wakes up when others have its place writes nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch.exit_codes import ExitCode
from launch.hang_watch import HangWatch
from moe_dist.errors import TrainingFault
from moe_dist.runtime.generation import Fence, begin_generation
from moe_dist.runtime.heartbeat import heartbeat, heartbeat_file, stack_file
from tests.faults.test_signals import config_path, finish, reached, start
from tests.launch.conftest import alive, events, wait_until
from tests.support.gang import run_gang

__all__ = ["config_path"]  # a fixture
LIMIT = 1.5
NO_END = "launch.hang_timeout_seconds=2.0"


def sit_in_a_sleep(until: float) -> None:
    """What the rank that hangs does; its name is looked for in its stack."""
    time.sleep(until)


def rank_that_may_hang(rank: int, folder: str, hanging: int | None) -> None:
    with heartbeat(Path(folder), (rank, 1), lambda: 7 if rank == hanging else 8, 0.2):
        if rank == hanging:
            sit_in_a_sleep(4 * LIMIT)
        elif hanging is None:
            deadline = time.monotonic() + 2 * LIMIT
            while time.monotonic() < deadline:  # slow work, and no hang
                sum(range(100_000))
        dist.barrier()


def watch_of(folder: Path, hanging: int | None) -> TrainingFault | None:
    """What the launcher sees of two ranks."""
    watch, found = HangWatch(folder, 2, 1, LIMIT), list[TrainingFault]()
    gang = threading.Thread(target=run_gang, args=(rank_that_may_hang, 2, str(folder), hanging))
    gang.start()
    while gang.is_alive():
        fault = watch.look()
        found += [fault] if fault else []
        time.sleep(0.05)
    gang.join()
    return found[0] if found else None


def test_rank_that_stands_still_is_named_and_not_the_one_that_waits_for_it(tmp_path: Path) -> None:
    fault = watch_of(tmp_path, hanging=1)
    assert fault is not None and fault.where == "rank 1"
    assert "stands still" in fault.value and "after step 7" in fault.value and "sit_in_a_sleep" in fault.value
    assert "sit_in_a_sleep" in stack_file(tmp_path, 1).read_text()
    assert "barrier" in stack_file(tmp_path, 0).read_text()


def test_ranks_that_work_slowly_are_not_named(tmp_path: Path) -> None:
    assert watch_of(tmp_path, hanging=None) is None


def test_stopped_rank_is_named_and_what_the_system_knows_is_saved(config_path: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(config_path, run_dir, NO_END)
    wait_until(reached(run_dir, 3), 60, "steps")
    victim = events(run_dir, "start")[0]["workers"][1]["pid"]
    os.kill(victim, signal.SIGSTOP)
    _, said = finish(process, ExitCode.TRAINING_FAILED)
    assert "rank 1" in said and "no sign of life" in said
    assert "stopped" in (run_dir / "ranks" / "stack-00001.txt").read_text()
    main_thread = (run_dir / "ranks" / "stack-00000.txt").read_text().rpartition("most recent call first):\n")[2]
    innermost = main_thread.splitlines()[0]  # in whichever collective of a step the other one was stopped
    assert any(place in innermost for place in ("torch/distributed", "moe_dist/parallel/", "checkpoint/agree"))
    assert not alive(victim)


def test_zombie_rank_writes_nothing_when_it_wakes_up(config_path: Path, tmp_path: Path) -> None:
    """The rank is stopped, its launcher killed, and the same command started again; then the rank is let go on."""
    run_dir = tmp_path / "run"
    alone = ["--ranks=1", "train.steps=100000", "launch.hang_timeout_seconds=null"]
    first = start(config_path, run_dir, *alone)
    wait_until(reached(run_dir, 25), 60, "a checkpoint")
    zombie = events(run_dir, "start")[0]["workers"][0]["pid"]
    os.kill(zombie, signal.SIGSTOP)
    first.kill()
    first.wait()  # not for its pipes, which the zombie holds
    second = start(config_path, run_dir, *alone)
    wait_until(lambda: len(events(run_dir, "start")) == 2, 60, "the second start")
    third = start(config_path, run_dir, *alone)
    _, said = finish(third, ExitCode.WRONG_INPUT)
    assert "one launcher at a time" in said
    mine = events(run_dir, "start")[1]["workers"][0]["pid"]
    os.kill(zombie, signal.SIGCONT)
    wait_until(lambda: not alive(zombie), 20, "the end of the zombie")
    seen = len(events(run_dir, "step"))
    wait_until(lambda: len(events(run_dir, "step")) > seen + 5, 30, "further steps")
    os.killpg(second.pid, signal.SIGTERM)
    found, _ = finish(second, ExitCode.INTERRUPTED)
    (run,) = [event for event in events(run_dir, "start") if event["workers"][0]["pid"] == mine]
    after = [event["step"] for event in events(run_dir, "step") if event["time"] > run["time"]]
    assert after == list(range(run["first_step"] + 1, found["steps"] + 1))  # each once, none of the zombie's


def test_older_generation_is_refused_by_name(tmp_path: Path) -> None:
    old, new = (Fence(tmp_path, begin_generation(tmp_path)) for _ in range(2))
    new.check()
    with pytest.raises(TrainingFault, match="generation 1; 2 has begun"):
        old.check()
    Fence().check()


def test_rank_that_never_told_anything_is_named_while_another_goes_on_telling(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path, 2, 1, 0.5)
    told: dict[str, Any] = {"generation": 1, "rank": 0, "step": 3, "still_seconds": 0.0, "waits": True}
    fault = None
    for beat in range(200):
        text = json.dumps({**told, "beat": beat, "where": "here", "pid": 0, "host": ""})
        heartbeat_file(tmp_path, 0).parent.mkdir(exist_ok=True)
        heartbeat_file(tmp_path, 0).write_text(text)
        if (fault := watch.look()) is not None:
            break
        time.sleep(0.05)
    assert fault is not None and fault.where == "rank 1" and "no sign of life" in fault.value


def test_process_of_a_rank_is_known_before_its_first_step(tmp_path: Path) -> None:
    with heartbeat(tmp_path, (0, 1), lambda: 0, 3600.0):
        told = json.loads(heartbeat_file(tmp_path, 0).read_text())
    assert told["pid"] == os.getpid() and told["beat"] == 1


def test_heartbeat_of_another_generation_counts_for_nothing(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path, 1, 2, 0.01)
    told: dict[str, Any] = {"generation": 1, "rank": 0, "beat": 1, "step": 0, "still_seconds": 99.0, "waits": False}
    (tmp_path / "ranks").mkdir()
    for generation, expected in ((1, None), (2, "rank 0")):
        text = json.dumps({**told, "generation": generation, "where": "here", "pid": 0, "host": ""})
        (tmp_path / "ranks" / "heartbeat-00000.json").write_text(text)
        fault = HangWatch.look(watch)
        assert (fault and fault.where) == expected
        time.sleep(0.25)
