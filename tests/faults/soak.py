"""A run under random faults, one every 15 to 60 seconds: `python -m tests.faults.soak [SECONDS] [SEED] [FOLDER]`.

Ranks are killed (also in the midst of a save) and stopped, the launcher is killed and the same command given again, the
newest checkpoint is damaged before that, and the disk of the checkpoints is full for a while. The run then ends by
Ctrl-C, and its losses are compared with those of a run of the same steps that nothing disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_dist.checkpoint import store
from moe_dist.train.account import account, read_events
from tests.faults.full_disk import fill_up
from tests.faults.three_nodes import write_config
from tests.launch.conftest import ROOT, wait_until

SHORTEST, LONGEST, HANGS_AFTER = 15, 60, 5
ROOM = "size=256m"
MODEL = {
    "vocab_size": 400,
    "num_layers": 4,
    "width": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 32,
    "moe": {"num_experts": 8, "expert_width": 128, "shared_expert_width": 0},
}
OVERRIDES = (
    "optimizer.min_lr_fraction=1.0",  # the schedule then does not depend on the number of steps
    "checkpoint.every_steps=20",
    "checkpoint.keep=3",
)


class Run:
    """The run, as a person would start it and start it again.

    Attributes:
        done: What was done to it, and when.
    """

    def __init__(self, config: Path, folder: Path, dice: random.Random) -> None:
        self.config, self.folder, self.dice = config, folder, dice
        self.run_dir, self.root = folder / "run", folder / "run" / "checkpoints"
        self.done: list[dict[str, Any]] = []
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        more = ["train.steps=1000000", "checkpoint.memory_every_steps=4", f"launch.hang_timeout_seconds={HANGS_AFTER}"]
        return start(self.config, self.run_dir, self.folder / "said", *OVERRIDES, *more)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run_dir / "progress.jsonl") if event["event"] == kind]

    def wait_for_step(self, seconds: float = 90) -> None:
        """Until a step is told that was not told before."""
        before = len(self.events("step"))
        self._wait(lambda: len(self.events("step")) > before, seconds, "a step")

    def _wait(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        def ready() -> object:
            assert self.process.poll() is None, (self.folder / "said").read_text()[-3000:]
            return condition()

        wait_until(ready, seconds, what)

    def victim(self) -> int:
        return int(self.dice.choice(self.events("start")[-1]["workers"])["pid"])

    def kill_a_rank(self) -> None:
        os.kill(self.victim(), signal.SIGKILL)

    def stop_a_rank(self) -> None:
        os.kill(self.victim(), signal.SIGSTOP)

    def kill_in_a_save(self) -> None:
        """As soon as a folder is there that is being written."""
        deadline = time.monotonic() + 20
        while not list(self.root.glob(".writing-step*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.kill_a_rank()

    def kill_the_launcher(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def flip_a_byte(self) -> None:
        """Of the newest checkpoint, which is then needed."""
        file = self._newest_part()
        content = bytearray(file.read_bytes())
        content[self.dice.randrange(len(content))] ^= 1 << self.dice.randrange(8)
        file.write_bytes(content)
        self.kill_the_launcher()

    def truncate(self) -> None:
        """A part of the newest checkpoint, which is then needed."""
        file = self._newest_part()
        os.truncate(file, self.dice.randrange(file.stat().st_size))
        self.kill_the_launcher()

    def fill_the_disk(self) -> None:
        told = len(self._refusals())
        fill_up(self.root, 4096)
        try:
            self._wait(lambda: len(self._refusals()) > told, 60, "a save without room")
        finally:
            (self.root / "others").unlink()

    def _refusals(self) -> list[dict[str, Any]]:
        return [event for event in self.events("message") if "no checkpoint, training goes on" in event["text"]]

    def _newest_part(self) -> Path:
        self._wait(lambda: store.committed(self.root), 60, "a checkpoint")
        return self.dice.choice(sorted(store.committed(self.root)[0].glob("*.safetensors")))

    def suffer(self) -> None:
        """One fault, after which the run makes steps again."""
        faults = [self.kill_a_rank, self.stop_a_rank, self.kill_in_a_save, self.kill_the_launcher]
        fault = self.dice.choice([*faults, self.flip_a_byte, self.truncate, self.fill_the_disk])
        starts, at = len(self.events("start")), time.time()
        fault()
        if fault != self.fill_the_disk:
            self._wait(lambda: len(self.events("start")) > starts, 90, f"another start after {fault.__name__}")
        self.wait_for_step()
        self.done.append({"fault": fault.__name__, "after": at, "seconds": time.time() - at})
        print(f"{fault.__name__:20} steps again after {self.done[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)

    def end(self) -> list[float]:
        """The losses of all steps, after Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(60) == 130, (self.folder / "said").read_text()[-3000:]
        return losses_in(self.folder / "said.json")


def start(config: Path, run_dir: Path, said: Path, *more: str) -> subprocess.Popen[bytes]:
    """`moe-dist simulate` on two ranks, in a process group of its own."""
    command = [sys.executable, "-m", "launch.cli", "simulate", str(config), f"run.dir={run_dir}", "--ranks=2"]
    with said.open("ab") as words, said.with_suffix(".json").open("wb") as result:
        return subprocess.Popen(
            [*command, *more, "--json"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=result,
            stderr=words,
            start_new_session=True,
        )


def losses_in(result: Path) -> list[float]:
    return list(json.loads(result.read_text().splitlines()[-1])["losses"])


def soak(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """The faults and what is left of the run after them."""
    data = {"input": str(folder / "text"), "dir": str(folder / "data"), "sequence_length_tokens": 128}
    train = {"steps": 100, "global_batch_sequences": 16, "micro_batch_sequences": 8}
    config = write_config(folder, model=MODEL, train=train, data={**data, "holdout_fraction": 0.2})
    root = folder / "run" / "checkpoints"
    root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ROOM, "tmpfs", str(root)], check=True)
    run, dice = Run(config, folder, random.Random(seed)), random.Random(seed + 1)
    try:
        run.wait_for_step()
        ends = time.monotonic() + seconds
        while True:
            rest = dice.uniform(SHORTEST, LONGEST)
            if time.monotonic() + rest > ends:
                break
            time.sleep(rest)
            run.suffer()
        time.sleep(max(0.0, ends - time.monotonic()))
        losses = run.end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
    told = account(read_events(run.run_dir / "progress.jsonl"))
    clean = start(config, folder / "clean", folder / "clean-said", *OVERRIDES, f"train.steps={len(losses)}")
    assert clean.wait(2 * seconds) == 0, (folder / "clean-said").read_text()[-3000:]
    undisturbed = losses_in(folder / "clean-said.json")
    return {"seed": seed, "faults": run.done, "effective_time": told, "losses": losses, "undisturbed": undisturbed}


def main() -> None:
    """Soaks, and prints one JSON object."""
    seconds, seed = (float(sys.argv[1]) if len(sys.argv) > 1 else 600.0), int((sys.argv[2:] or [time.time()])[0])
    print(f"seed {seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(soak(folder, seconds, seed)))


if __name__ == "__main__":
    main()
