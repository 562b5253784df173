"""A run directory for the stand-in rank, and processes that tests start, signal and count."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import jobs
from moe_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def behave(run_dir: Path, **behaviour: Any) -> None:
    """Tells the stand-in what to do."""
    (run_dir / "behaviour.json").write_text(json.dumps({"steps": 5, **behaviour}))


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The progress events of one kind."""
    path = run_dir / "progress.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Waits for a condition; a time-out fails the test."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} took more than {seconds} s"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def command(pid: int) -> str:
    """A process's command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except FileNotFoundError:
        return ""


def descendants(pid: int) -> list[int]:
    """Processes below a process."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


@pytest.fixture
def start_driver(run_dir: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts `tests.launch.driver` in a process group of its own, as a terminal does."""
    started: list[subprocess.Popen[str]] = []

    def start(launcher: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.driver", launcher, str(run_dir)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@contextlib.contextmanager
def head_node(folder: Path) -> Iterator[str]:
    """The job server's address of a head node that runs in the foreground, as a child that is ended.

    Not a fixture of many tests: while it runs, `moe-dist train` without an address joins it.
    """
    gcs, dashboard, client, agent = free_ports(4)
    ray_folder = folder / "r"
    ray_folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", str(ray_folder))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.delenv("RAY_ADDRESS", raising=False)
        command = ["start", "--head", "--block", "--num-cpus=1", "--include-dashboard=true", f"--port={gcs}"]
        command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000"]
        log = folder / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            yield _ready(f"http://127.0.0.1:{dashboard}", process, log)
        finally:
            below = descendants(process.pid)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            for pid in (process.pid, *below):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _ready(address: str, process: subprocess.Popen[bytes], log: Path) -> str:
    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            jobs._client(address).list_jobs()
        except (ConfigError, RuntimeError):
            return False
        return True

    wait_until(answers, 60, "the head node")
    return address
