"""Kills a save at one call to the system after the other: `python -m tests.faults.kill_points FOLDER`.

Every save runs in a child of this process that kills itself (SIGKILL) at its n-th call that changes the disk: before
it, or in the midst of a write. Prints a JSON list: for every point where it was killed, in which call, what was
committed then, and what loads.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint import store, write
from moe_dist.checkpoint.load import load_newest_model
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.read import verify
from tests.support.checkpoints import one_rank_checkpoint

CALLS = ("mkdir", "open", "write", "ftruncate", "fsync", "rename", "unlink", "rmdir")
BLOCK = 16_384  # so that a small part takes many writes


def kill_at(point: int, told: int) -> None:
    """Wraps the calls that change the disk: the `point`-th of them is the last thing that this process does."""
    count = 0

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if name == "open" and not arguments[1] & os.O_CREAT:
                return call(*arguments, **options)
            if name == "write" and arguments[0] == told:
                return call(*arguments, **options)
            count += 1
            if count == point:
                if name == "write":
                    call(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2 // 4096 * 4096])
                original(told, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    original = os.write
    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def killed_save(root: Path, step: int, point: int) -> str:
    """The call in which a save was killed; empty where it ended before."""
    reading, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write._BLOCK = BLOCK
            kill_at(point, told)
            one_rank_checkpoint(root, step, mark=step + 0.5)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(told)
    name = os.read(reading, 100).decode()
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert name or os.waitstatus_to_exitcode(status) == 0, f"point {point}: the save failed"
    return name


def points_of(folder: Path, before: list[int], step: int) -> list[dict[str, Any]]:
    """Kills a save of a step, where others are committed, at every point that it has."""
    found: list[dict[str, Any]] = []
    while True:
        root = folder / f"{step}-{len(found) + 1}"
        shutil.copytree(folder / "before", root)
        call = killed_save(root, step, len(found) + 1)
        reports: list[str] = []
        for path in store.committed(root):
            verify(path, read_manifest(path))
        model, manifest = load_newest_model(root, torch.device("cpu"), reports.append)
        marks = {float(p.detach().unique()) for p in model.parameters()}
        newest = max(store.step_of(path) for path in store.committed(root))
        after = one_rank_checkpoint(root, step + 1, mark=0.0)
        left = [path.name for path in root.iterdir() if not path.name.startswith("step-")]
        row = {"call": call, "before": before, "newest": newest, "loaded": manifest.step, "marks": sorted(marks)}
        found.append({**row, "reports": reports, "after": after.name, "left": left})
        shutil.rmtree(root)
        if not call:
            return found


def main() -> None:
    """Two saves: of a new step, by which the oldest is pruned, and of a step that is there already."""
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = Path(sys.argv[1])
    steps = [7, 8]
    found: list[dict[str, Any]] = []
    for step in steps:
        one_rank_checkpoint(folder / "before", step, mark=float(step))
    for step in (9, 8):
        found += points_of(folder, steps, step)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
