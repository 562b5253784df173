"""A run on a Ray cluster of several nodes of this machine that lose workers and nodes, as a person would start it.

    python -m tests.faults.three_nodes [FOLDER]

A worker is killed; a raylet is killed while another node is free; one is killed with none to spare, so that three ranks
become two and the experts are cut anew; a node comes back, and two become three. Prints a table of how long each took
until training went on, and how many steps were made again; the losses are compared with those of a run that nothing
disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.faults.test_signals import TREE
from tests.launch.conftest import ROOT, events, wait_until

# Ray's own settings, so that it soon finds out that a node is gone.
SYSTEM = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


@dataclass(frozen=True)
class Recovery:
    """What one fault cost.

    Attributes:
        fault: What was done.
        seconds: From the fault to the first step after it.
        lost_steps: Steps made again.
        ranks: Ranks after it.
        layout: Their layout, as the run tells it.
    """

    fault: str
    seconds: float
    lost_steps: int
    ranks: int
    layout: str


@dataclass(frozen=True)
class Found:
    """All that happened: recoveries, the losses of the run, and those of a run that nothing disturbed."""

    recoveries: list[Recovery]
    losses: list[float]
    undisturbed: list[float]


def write_config(folder: Path, **more: Any) -> Path:
    """A small model over a few of our own sources, whose steps take some tens of milliseconds."""
    (folder / "text").mkdir()
    for name in ("launch/cli.py", "launch/local.py", "moe_dist/train/step.py", "moe_dist/moe/layer.py", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (folder / "text" / f"{Path(name).name}.txt").write_text(text, encoding="utf-8")
    data = {"input": str(folder / "text"), "dir": str(folder / "data"), "sequence_length_tokens": 64}
    tree = {**TREE, "data": {**data, "holdout_fraction": 0.2}, "checkpoint": {"every_steps": 20}}
    tree["train"] = {"steps": 100_000, "global_batch_sequences": 12, "micro_batch_sequences": 6}
    tree["generate"] = {"prompts": []}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, **more}))
    return path


def command(*arguments: str) -> subprocess.Popen[str]:
    """`moe-dist` in a process group of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments, "--json"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], code: int, seconds: float = 120) -> dict[str, Any]:
    """The JSON object of a command that ends with this code."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err[-4000:]
    return json.loads(out.splitlines()[-1])


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[Any]:
    """A head without CPUs and so many nodes with one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": SYSTEM})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


class Watched:
    """A run whose record is followed while faults are made."""

    def __init__(self, run_dir: Path, process: subprocess.Popen[str]) -> None:
        self.run_dir, self.process = run_dir, process

    def steps(self) -> list[dict[str, Any]]:
        return events(self.run_dir, "step")

    def goes_on(self, more: int = 3) -> None:
        """Waits until so many further steps are made."""
        before = len(self.steps())
        self._wait(lambda: len(self.steps()) >= before + more, "further steps")

    def workers(self) -> list[dict[str, Any]]:
        return events(self.run_dir, "start")[-1]["workers"]

    def after(self, fault: str, make: Callable[[], None], ranks: int) -> Recovery:
        """Makes a fault when a step has just ended, and waits until a generation of so many ranks makes steps."""
        self.goes_on()
        starts, made, at = len(events(self.run_dir, "start")), len(self.steps()), time.time()
        make()

        def recovered() -> bool:
            found = events(self.run_dir, "start")[starts:]
            return bool(found) and found[-1]["ranks"] == ranks and self.steps()[-1]["time"] > found[-1]["time"]

        self._wait(recovered, f"a generation of {ranks} ranks after: {fault}")
        start = events(self.run_dir, "start")[-1]
        before = [step for step in self.steps() if step["time"] < start["time"]]
        first = next(step for step in self.steps() if step["time"] > start["time"])
        layout = [m["text"] for m in events(self.run_dir, "message") if " ranks: " in m["text"]][-1].rpartition(";")[0]
        lost = max(step["step"] for step in before) - start["first_step"]
        assert made > 0
        return Recovery(fault, first["time"] - at, lost, ranks, layout)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.process.communicate()[1][-4000:]
            return condition()

        wait_until(ready, 90, what)


def play(folder: Path, *overrides: str) -> Found:
    """The whole play: four faults, then Ctrl-C, then the run that nothing disturbs."""
    config, run_dir = write_config(folder), folder / "run"
    with cluster_of(4) as cluster:
        asked = ["launch.workers={min: 2, max: 3}", "launch.placement=strict_spread", *overrides]
        process = command("train", str(config), f"run.dir={run_dir}", "--address", cluster.address, *asked)
        run = Watched(run_dir, process)
        wait_until(lambda: bool(run.steps()) or process.poll() is not None, 90, "the first step")

        def kill_worker() -> None:
            os.kill(run.workers()[1]["pid"], signal.SIGKILL)

        def kill_node() -> None:
            (node,) = (n for n in cluster.worker_nodes if n.node_id == run.workers()[1]["node"])
            cluster.remove_node(node, allow_graceful=False)

        recoveries = [
            run.after("a worker killed", kill_worker, 3),
            run.after("a raylet killed, one to spare", kill_node, 3),
            run.after("a raylet killed, none to spare", kill_node, 2),
            run.after("a node comes back", lambda: cluster.add_node(num_cpus=1), 3),
        ]
        run.goes_on()
        os.killpg(process.pid, signal.SIGINT)
        losses = ended(process, 130)["losses"]
    steps = [f"train.steps={len(losses)}", "run.dir=" + str(folder / "undisturbed")]
    # The schedule of the learning rate follows from train.steps: both must end at the same step.
    undisturbed = ended(command("simulate", str(config), "--ranks=3", *steps, "optimizer.min_lr_fraction=1.0"), 0)
    return Found(recoveries, losses, undisturbed["losses"])


def play_a_hang(folder: Path, limit: float) -> Found:
    """A worker of two is stopped by SIGSTOP; then Ctrl-C, then the run that nothing disturbs."""
    config, run_dir = write_config(folder), folder / "run"
    flat = "optimizer.min_lr_fraction=1.0"
    with cluster_of(2) as cluster:
        asked = ["launch.workers=2", "launch.placement=strict_spread", f"launch.hang_timeout_seconds={limit}", flat]
        process = command("train", str(config), f"run.dir={run_dir}", "--address", cluster.address, *asked)
        run = Watched(run_dir, process)
        wait_until(lambda: bool(run.steps()) or process.poll() is not None, 90, "the first step")
        recovery = run.after("a worker hangs", lambda: os.kill(run.workers()[1]["pid"], signal.SIGSTOP), 2)
        run.goes_on()
        os.killpg(process.pid, signal.SIGINT)
        losses = ended(process, 130)["losses"]
    steps = [f"train.steps={len(losses)}", "run.dir=" + str(folder / "undisturbed"), flat]
    undisturbed = ended(command("simulate", str(config), "--ranks=2", *steps), 0)
    return Found([recovery], losses, undisturbed["losses"])


def main() -> None:
    """Plays once and prints the table."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(made)
        folder.mkdir(exist_ok=True)
        found = play(folder, "optimizer.min_lr_fraction=1.0")
    for row in found.recoveries:
        print(f"{row.fault:32} {row.seconds:6.1f} s  {row.lost_steps:3} steps lost  {row.layout}")
    far = max(abs(a - b) / b for a, b in zip(found.losses, found.undisturbed, strict=True))
    print(f"{len(found.losses)} steps, losses {far:.1e} from those of a run that nothing disturbed")


if __name__ == "__main__":
    main()
