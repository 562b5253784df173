"""Signals to a real run: SIGTERM to its launcher or to one rank saves and ends, and a kill is accounted for.

One little corpus, one configuration, two ranks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.exit_codes import ExitCode
from moe_dist.train.account import account, read_events
from tests.launch.conftest import ROOT, alive, events, wait_until

TREE: dict[str, Any] = {
    "model": {
        "vocab_size": 400,
        "num_layers": 1,
        "width": 32,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_width": 16,
        "moe": {"num_experts": 4, "expert_width": 16, "shared_expert_width": 0},
    },
    "train": {"steps": 100_000, "global_batch_sequences": 4, "micro_batch_sequences": 4},
    "evaluate": {"sequences": 4},
    "generate": {"max_new_tokens": 4, "prompts": ["def "]},
    "checkpoint": {"every_steps": 20},
}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    (folder / "text").mkdir()
    for name in ("launch/cli.py", "launch/local.py", "moe_dist/train/step.py", "moe_dist/moe/layer.py", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for part in range(4):
            piece = text[len(text) * part // 4 : len(text) * (part + 1) // 4]
            (folder / "text" / f"{Path(name).name}-{part}.txt").write_text(piece, encoding="utf-8")
    data = {"input": str(folder / "text"), "dir": str(folder / "data"), "sequence_length_tokens": 16}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**TREE, "data": {**data, "holdout_fraction": 0.2}}))
    return path


def start(config: Path, run_dir: Path, *more: str) -> subprocess.Popen[str]:
    """`moe-dist simulate` in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launch.cli",
            "simulate",
            str(config),
            f"run.dir={run_dir}",
            "--ranks=2",
            *more,
            "--json",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int, seconds: float = 60) -> tuple[dict[str, Any], str]:
    """The JSON object and the words of a command that ends with this code."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err[-3000:]
    return (json.loads(out.splitlines()[-1]) if out else {}), err


def reached(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: any(event["step"] >= step for event in events(run_dir, "step"))


def ranks(run_dir: Path) -> list[int]:
    return [worker["pid"] for worker in events(run_dir, "start")[-1]["workers"]]


def test_sigterm_and_ctrl_c_save_and_end_with_130_and_the_run_goes_on(config_path: Path, tmp_path: Path) -> None:
    """First to the launcher alone, as a scheduler sends it; then to one rank alone, as a node that is taken away."""
    run_dir = tmp_path / "run"
    process = start(config_path, run_dir)
    wait_until(reached(run_dir, 3), 60, "step 3")
    os.kill(process.pid, signal.SIGTERM)
    stopped, err = finish(process, ExitCode.INTERRUPTED)
    assert stopped["status"] == "interrupted" and "interrupted after step" in err
    assert Path(stopped["checkpoint"]).is_dir() and int(stopped["checkpoint"][-8:]) == stopped["steps"]
    assert not (run_dir / "stop-requested").exists() and not any(map(alive, ranks(run_dir)))

    process = start(config_path, run_dir)
    wait_until(reached(run_dir, stopped["steps"] + 3), 60, "three more steps")
    assert events(run_dir, "start")[-1]["first_step"] == stopped["steps"]
    os.kill(ranks(run_dir)[1], signal.SIGTERM)
    again, _ = finish(process, ExitCode.INTERRUPTED)
    assert again["steps"] > stopped["steps"] and Path(again["checkpoint"]).is_dir()
    assert not any(map(alive, ranks(run_dir)))
    effective = again["effective_time"]
    assert (effective["attempts"], effective["recomputed_steps"]) == (2, 0)
    assert effective["first_time_steps"] == again["steps"] and effective["seconds"]["downtime"] > 0


def test_killed_run_that_goes_on_accounts_for_lost_steps_and_downtime(config_path: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(config_path, run_dir, "checkpoint.every_steps=10", "train.steps=1000000")
    wait_until(lambda: reached(run_dir, 13)() and list(run_dir.glob("checkpoints/step-*")), 60, "a checkpoint")
    os.kill(ranks(run_dir)[0], signal.SIGKILL)
    finish(process, ExitCode.TRAINING_FAILED)
    before = [event["step"] for event in events(run_dir, "step")]
    last_sign = max(event["time"] for event in read_events(run_dir / "progress.jsonl"))
    # A longer interval, so that all that was lost is made again before anything ends.
    process = start(config_path, run_dir, "checkpoint.every_steps=1000000", "train.steps=1000000")
    wait_until(reached(run_dir, before[-1] + 2), 60, "what was lost")
    os.kill(process.pid, signal.SIGTERM)
    summary, err = finish(process, ExitCode.INTERRUPTED)
    first = events(run_dir, "start")[-1]["first_step"]
    effective, seconds = summary["effective_time"], summary["effective_time"]["seconds"]
    assert first % 10 == 0 and effective["recomputed_steps"] == before[-1] - first
    assert effective["first_time_steps"] == summary["steps"] and effective["attempts"] == 2
    again = events(run_dir, "step")[len(before) : len(before) + before[-1] - first]
    spent = sum(event["seconds"] - event["data_seconds"] for event in again)
    assert seconds["recomputed"] == pytest.approx(spent)
    attempt = events(run_dir, "attempt")[-1]["time"]
    assert seconds["downtime"] == pytest.approx(attempt - last_sign)
    assert sum(seconds.values()) == pytest.approx(effective["wall_seconds"])
    assert min(seconds[name] for name in ("steps", "start_up", "restore", "save", "evaluation", "data_wait")) > 0
    assert effective["share"] == pytest.approx(seconds["steps"] / effective["wall_seconds"])
    assert f"{effective['share']:.1%} of" in err and "steps made again" in err


def lines(*told: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [{"event": kind, "time": time, **dict(more)} for time, kind, *rest in told for more in (rest or [{}])]


def test_account_of_three_attempts_adds_up_to_the_wall_time() -> None:
    def step(number: int) -> dict[str, Any]:
        return {"step": number, "seconds": 2.0, "data_seconds": 0.5}

    told = lines(
        (100.0, "attempt"),
        (104.0, "boot"),
        (105.0, "spent", {"what": "restore", "seconds": 0.5}),
        (106.0, "start", {"first_step": 0}),
        *((106.0 + 2 * number, "step", step(number)) for number in (1, 2, 3)),
        (113.0, "spent", {"what": "save", "seconds": 1.0}),
        (115.0, "step", step(4)),
        (130.0, "boot"),  # workers started again by Ray
        (132.0, "spent", {"what": "restore", "seconds": 1.0}),
        (133.0, "start", {"first_step": 3}),
        *((133.0 + 2 * number, "step", step(number + 3)) for number in (1, 2)),
        (200.0, "attempt"),
        (205.0, "boot"),
        (206.0, "start", {"first_step": 3}),
        *((206.0 + 2 * number, "step", step(number + 3)) for number in (1, 2, 3)),
    )
    found = account(told)
    assert (found["wall_seconds"], found["attempts"], found["first_time_steps"]) == (112.0, 3, 6)
    assert found["recomputed_steps"] == 3
    assert found["seconds"] == {
        "steps": 9.0,
        "recomputed": 4.5,
        "data_wait": 4.5,
        "start_up": 5.5 + 2.0 + 6.0,
        "restore": 1.5,
        "save": 1.0,
        "evaluation": 0.0,
        "downtime": 15.0 + 63.0,
        "other": pytest.approx(0.0),
    }
    assert found["share"] == pytest.approx(9 / 112)
    assert account([]) == {} == account([{"event": "step", "step": 1, "seconds": 1.0}])


def test_events_after_a_line_that_a_kill_cut_short_are_read(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text('{"event": "boot", "time": 1.0}\n{"event": "step", "st{"event": "attempt", "time": 9.0}\n{"even')
    assert [event["time"] for event in read_events(path)] == [1.0, 9.0]
