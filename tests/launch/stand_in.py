"""A rank that only counts steps: what the launchers need of `launch.train.run_worker`, in milliseconds.

`<run.dir>/behaviour.json` tells it what to do, so that one function serves every test:
`steps`, `step_seconds`, `raise` (`rank`, `step`, `kind`), `die` (`rank`, `step`: SIGKILL, once).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.interrupt import STOP_FILE
from launch.progress import PROGRESS_FILE
from moe_dist import errors
from moe_dist.config import Config
from moe_dist.runtime.process import Process


def run_worker(config: Config, build_dir: Path, process: Process) -> dict[str, Any]:
    """Counts on from the step in the file `done` to `steps`; each step is one sum over all ranks."""
    run_dir = Path(config.run.dir)
    behaviour = json.loads((run_dir / "behaviour.json").read_text())
    done_file = run_dir / "done"
    done = int(done_file.read_text()) if done_file.exists() else 0
    me = {"rank": process.rank, "node": process.node, "host": socket.gethostname(), "pid": os.getpid()}
    workers: list[Any] = [None] * process.world_size
    dist.all_gather_object(workers, me)
    steps = behaviour["steps"]
    _tell(process, run_dir, event="start", first_step=done, steps=steps, ranks=process.world_size, workers=workers)
    status = "finished"
    for step in range(done + 1, steps + 1):
        _misbehave(behaviour, run_dir, process.rank, step)
        time.sleep(behaviour.get("step_seconds", 0.01))
        stop = torch.tensor([float((run_dir / STOP_FILE).exists())])
        dist.all_reduce(stop)
        _tell(process, run_dir, event="step", step=step, loss=1.0 / step, tokens_per_second=1000.0, drop_rate=0.0)
        if process.rank == 0:
            done_file.write_text(str(step))
        if stop.item():
            status = "interrupted"
            break
    _tell(process, run_dir, event="end", status=status)
    return {"status": status, "first_step": done, "steps": step, "workers": workers, "environment": dict(os.environ)}


def _misbehave(behaviour: dict[str, Any], run_dir: Path, rank: int, step: int) -> None:
    plan = behaviour.get("raise")
    if plan and (rank, step) == (plan["rank"], plan["step"]):
        if plan["kind"] == "bug":
            raise ZeroDivisionError("a bug in the model")
        raise getattr(errors, plan["kind"])("shard 7", "flipped byte", "shards keep their checksum", "build it again")
    plan = behaviour.get("die")
    if plan and (rank, step) == (plan["rank"], plan["step"]) and not (run_dir / "died").exists():
        (run_dir / "died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)


def _tell(process: Process, run_dir: Path, **event: Any) -> None:
    if process.rank == 0:
        with (run_dir / PROGRESS_FILE).open("a") as file:
            file.write(json.dumps({**event, "time": time.time()}) + "\n")
