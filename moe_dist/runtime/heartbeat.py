"""The heartbeat of a rank: a thread that tells, a few times in every time-out, what the main thread does.

    <run.dir>/ranks/heartbeat-00003.json    generation, beat, step, how long the main thread has stood still and where
    <run.dir>/ranks/stacks-asked            the launcher asks for stacks, with the number of its generation
    <run.dir>/ranks/stack-00003.txt         all threads of a rank, where it could still answer

A thread stands still when step and stack, line by line, are the same at each look and it neither used a core nor waited
for one in between.
A rank that is stopped by a signal, or whose interpreter is blocked, tells nothing at all; that is seen from outside
(launch/hang_watch.py).
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

RANKS_FOLDER = "ranks"
ASKED_FILE = "stacks-asked"

_IDLE_FRACTION = 0.02  # of a core: with less, a thread does nothing
# A main thread whose innermost Python frame lies here waits for other ranks.
_WAITS_FOR_OTHERS = ("torch/distributed", "moe_dist/parallel/", "moe_dist/checkpoint/agree")


def heartbeat_file(run_dir: Path, rank: int) -> Path:
    """Where a rank tells what it does."""
    return run_dir / RANKS_FOLDER / f"heartbeat-{rank:05d}.json"


def stack_file(run_dir: Path, rank: int) -> Path:
    """Where a rank's stack is saved."""
    return run_dir / RANKS_FOLDER / f"stack-{rank:05d}.txt"


def beat_seconds(hang_timeout_seconds: float) -> float:
    """How often a rank tells: ten times in a time-out, but neither busily nor sleepily."""
    return min(5.0, max(0.2, hang_timeout_seconds / 10))


@contextmanager
def heartbeat(run_dir: Path, place: tuple[int, int], step: Callable[[], int], every_seconds: float) -> Iterator[None]:
    """Tells about the thread that enters it, until it leaves.

    Args:
        run_dir: The run's directory.
        place: Rank, and the generation it belongs to.
        step: Updates made so far.
        every_seconds: Between two beats.
    """
    beating = _Heart(run_dir, place, step, threading.get_ident())
    ended = threading.Event()

    def beat() -> None:
        with suppress(OSError):  # a full disk must not stop what only watches
            beating.beat()

    def go_on_beating() -> None:
        while not ended.wait(every_seconds):
            beat()

    beat()  # at once: of a rank that is stopped in its first steps the launcher then knows the process

    thread = threading.Thread(target=go_on_beating, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        heartbeat_file(run_dir, place[0]).unlink(missing_ok=True)


class _Heart:
    def __init__(self, run_dir: Path, place: tuple[int, int], step: Callable[[], int], watched: int) -> None:
        self.run_dir, self.place, self.step, self.watched = run_dir, place, step, watched
        self.clock, self.native = time.pthread_getcpuclockid(watched), threading.get_native_id()
        self.beats, self.answered = 0, False
        self.before: tuple[Any, ...] = ()
        self.since = self.looked = time.monotonic()
        self.used = self._used_seconds()
        (run_dir / RANKS_FOLDER).mkdir(parents=True, exist_ok=True)

    def beat(self) -> None:
        """Looks at the watched thread and tells; answers where stacks are asked for."""
        rank, generation = self.place
        self.beats += 1
        frame = sys._current_frames().get(self.watched)
        self._judge((self.step(), _stack(frame)))
        told: dict[str, Any] = {"generation": generation, "rank": rank, "beat": self.beats, "step": self.step()}
        told |= {"pid": os.getpid(), "host": os.uname().nodename, "still_seconds": self.looked - self.since}
        told |= {"where": _where(frame), "waits": _waits(frame)}
        path = heartbeat_file(self.run_dir, rank)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(told), encoding="utf-8")
        draft.replace(path)
        if not self.answered and _asked(self.run_dir) == generation:
            self.answered = True
            with stack_file(self.run_dir, rank).open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    def _judge(self, stands: tuple[Any, ...]) -> None:
        """Notes since when the thread stands still."""
        before, used_before = self.looked, self.used
        self.looked, self.used = time.monotonic(), self._used_seconds()
        idle = self.used - used_before < _IDLE_FRACTION * (self.looked - before)
        if not idle or stands != self.before:
            self.before, self.since = stands, self.looked

    def _used_seconds(self) -> float:
        """How long the thread has used a core or waited for one that others had."""
        try:
            ran, delayed, *_ = Path(f"/proc/self/task/{self.native}/schedstat").read_text().split()
            return (int(ran) + int(delayed)) / 1e9
        except (OSError, ValueError):  # the kernel does not say
            return time.clock_gettime(self.clock)


def _asked(run_dir: Path) -> int | None:
    """The generation whose stacks are asked for."""
    try:
        return int((run_dir / RANKS_FOLDER / ASKED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _stack(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    """What is compared between two looks: every function on the stack and the instruction it is at."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def _where(frame: FrameType | None) -> str:
    if frame is None:
        return "the thread is gone"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"


def _waits(frame: FrameType | None) -> bool:
    return frame is not None and any(part in frame.f_code.co_filename for part in _WAITS_FOR_OTHERS)
