"""A run whose checkpoints lie on a small tmpfs that is full for a while: `unshare -rm python -m ... FOLDER MODE`.

The room is a little more than the tensors take, so that the check before a save passes and the kernel refuses a write
in the midst of it; or less, so that the check refuses. Prints the messages of the run and what was committed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint import store
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.read import verify
from moe_dist.train.evaluate import HeldOut
from moe_dist.train.loop import Trainer
from moe_dist.train.metrics import Recorder
from tests.support.models import VOCAB, random_rows, small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee
from tests.train.test_step import Rows

STEPS, FULL_FROM, FULL_TO = 10, 3, 7  # saves after steps 2, 4, 6, 8 and 10; those of 4 and 6 find no room


def fill_up(root: Path, leave: int) -> None:
    """Leaves so many bytes."""
    free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    with (root / "others").open("wb") as file:
        file.write(b"x" * (free - leave))


def run(folder: Path, mode: str, asynchronous: bool) -> dict[str, Any]:
    root = folder / "checkpoints"
    root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(root)], check=True)
    settings = {"every_steps": 2, "keep": 2, "asynchronous": asynchronous}
    config = small_config(run={"dir": str(folder)}, train={"steps": STEPS}, checkpoint=settings)
    trainee = parallel_trainee(config, 1, optimizer="adamw")
    recorder = Recorder(folder, True, flops_per_token=1e3, peak_flops=1e9)
    held_out = HeldOut(random_rows(4, seed=99), 4, torch.ones(VOCAB, dtype=torch.int64))
    trainer = Trainer(trainee, Rows(0, 1), held_out, recorder)
    recorder.open(0, STEPS, [])
    needed = 3 * 8 * sum(p.numel() for p in trainee.model.parameters())

    def between_steps() -> bool:
        trainer.saver.wait()
        if trainer.step == FULL_FROM:
            fill_up(root, needed + 4096 if mode == "while writing" else needed // 2)
        if trainer.step == FULL_TO:
            (root / "others").unlink()
        return False

    status = trainer.run(between_steps)
    trainer.close()
    recorder.close()
    for path in store.committed(root):
        verify(path, read_manifest(path))
    events = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    told = [event["text"] for event in events if event["event"] == "message"]
    left = sorted(path.name for path in root.iterdir())
    losses = [row["loss"] for row in recorder.rows]
    return {"status": status, "told": told, "left": left, "losses": losses, "needed": needed}


if __name__ == "__main__":
    with one_rank():
        found = [
            run(Path(sys.argv[1]) / f"{mode} {asynchronous}", mode, asynchronous)
            for mode in ("while writing", "before")
            for asynchronous in (False, True)
        ]
    print(json.dumps(found))
