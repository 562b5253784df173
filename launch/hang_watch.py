"""Which rank hangs: read from the heartbeats of all ranks, which lie in the run's directory.

A gang hangs when some rank has told nothing new, or stood still at the same line, for `launch.hang_timeout_seconds`.
Most of them then wait in a collective for the one that does not come, and are not to blame. To blame are, in this
order: ranks that tell nothing any more (stopped, or their interpreter is blocked); ranks that stand still outside a
collective; and where all of them wait, those that have made the fewest steps.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.errors import TrainingFault
from moe_dist.runtime.heartbeat import ASKED_FILE, RANKS_FOLDER, beat_seconds, heartbeat_file, stack_file

_UNSEEN = {"step": 0, "still_seconds": 0.0, "waits": False, "where": "its start", "pid": 0, "host": ""}
_ANSWER_SECONDS = 2.0  # beyond two beats, for ranks to write their stacks


@dataclass
class _Seen:
    """What a rank told last, and when that was seen."""

    told: dict[str, Any]
    at: float


class HangWatch:
    """Looks at the heartbeats of one generation.

    Args:
        run_dir: The run's directory.
        ranks: How many there are.
        generation: Whose heartbeats count.
        limit: `launch.hang_timeout_seconds`; None watches nothing.
    """

    def __init__(self, run_dir: Path, ranks: int, generation: int, limit: float | None) -> None:
        self.run_dir, self.ranks, self.generation, self.limit = run_dir, ranks, generation, limit
        self._seen: dict[int, _Seen] = {}
        self._looked, self._began = 0.0, 0.0
        self._judged: dict[int, _Seen] = {}
        self._silent: list[int] = []
        self._ending = False
        folder = run_dir / RANKS_FOLDER
        for left in (*folder.glob("heartbeat-*"), folder / ASKED_FILE):
            left.unlink(missing_ok=True)

    def look(self) -> TrainingFault | None:
        """The fault of a rank that hangs, with all stacks saved; None while there is none or it is too early."""
        now = time.monotonic()
        if self.limit is None or now - self._looked < beat_seconds(self.limit):
            return None
        self._looked = now
        for rank in range(self.ranks):
            told = self._read(rank)
            if told is None:
                self._ending |= rank in self._seen  # its heartbeat is taken away: it has ended its training
            elif rank not in self._seen or told["beat"] != self._seen[rank].told["beat"]:
                self._began = self._began or now
                self._seen[rank] = _Seen(told, now)
        blamed = self._blamed(now)
        if not blamed:
            return None
        self._save_stacks()
        return self._fault(blamed, now)

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            told = json.loads(heartbeat_file(self.run_dir, rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return told if told["generation"] == self.generation else None

    def _blamed(self, now: float) -> list[int]:
        """The ranks to blame, or none while nobody has been still for too long."""
        if self.limit is None or self._ending or not self._seen:
            return []  # still starting: what takes too long there is told by the time-out of the first collective
        # Who never told anything is silent since the first of the others began, however often those tell since.
        unseen = _Seen(_UNSEEN, self._began)
        self._judged = {rank: self._seen.get(rank, unseen) for rank in range(self.ranks)}
        still = [rank for rank, seen in self._judged.items() if seen.told["still_seconds"] > self.limit]
        # Where the others already stand still, who has not been heard for half as long will not be heard again.
        quiet = self.limit / 2 if still else self.limit
        self._silent = [rank for rank, seen in self._judged.items() if now - seen.at > quiet]
        if self._silent or not still:
            return self._silent
        # Who is not in a collective is what the others wait for: it stands still elsewhere, is slow, or in a loop.
        at_work = [rank for rank, seen in self._judged.items() if not seen.told["waits"]]
        outside = [rank for rank in at_work if rank in still] or at_work or still
        fewest = min(self._judged[rank].told["step"] for rank in outside)
        return [rank for rank in outside if self._judged[rank].told["step"] == fewest]

    def _save_stacks(self) -> None:
        """Asks all ranks for their stacks; of one that cannot answer, what the system knows is written down."""
        for rank in range(self.ranks):
            stack_file(self.run_dir, rank).unlink(missing_ok=True)
        (self.run_dir / RANKS_FOLDER / ASKED_FILE).write_text(str(self.generation), encoding="utf-8")
        deadline = time.monotonic() + 2 * beat_seconds(self.limit or 0) + _ANSWER_SECONDS
        missing = set(range(self.ranks))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not _has_text(stack_file(self.run_dir, rank))}
            time.sleep(0.1)
        for rank in missing:
            told = self._judged[rank].told
            text = f"rank {rank} did not answer.\nlast seen at {told['where']}\n{_of_the_system(told)}"
            stack_file(self.run_dir, rank).write_text(text, encoding="utf-8")

    def _fault(self, blamed: list[int], now: float) -> TrainingFault:
        rank = blamed[0]
        seen = self._judged[rank]
        silent = rank in self._silent
        seconds = now - seen.at if silent else seen.told["still_seconds"]
        what = "gives no sign of life" if silent else "stands still"
        others = f", and ranks {blamed[1:]} likewise" if len(blamed) > 1 else ""
        return TrainingFault(
            f"rank {rank}",
            f"hangs: {what} for {seconds:.0f} s after step {seen.told['step']}, at {seen.told['where']}{others}",
            f"a rank goes on within launch.hang_timeout_seconds={self.limit:g}",
            f"look at {stack_file(self.run_dir, rank)}; the same command continues from the newest checkpoint",
        )


def _has_text(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _of_the_system(told: dict[str, Any]) -> str:
    """State and kernel function of a process of this machine."""
    if told["host"] != os.uname().nodename:
        return f"process {told['pid']} of {told['host']}"
    lines = []
    for name in ("status", "wchan"):
        try:
            text = Path(f"/proc/{told['pid']}/{name}").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = "not to be had"
        lines.append(next((line for line in text.splitlines() if line.startswith("State")), text.strip()[:200]))
    return f"process {told['pid']}: {'; '.join(lines)}"
