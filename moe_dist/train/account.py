"""Effective training time: of all the time since a run first began, how much went into steps that were made for the
first time, and where the rest went.

It is a fold over `progress.jsonl`, which is only ever appended to and so survives a kill. Every event has a `time`
(seconds since the epoch); those that matter here:

    attempt   the launcher begins to start ranks
    boot      rank 0 begins; without an `attempt` before it, a group of workers was started again
    spent     `what` (restore, save, evaluation) took `seconds`
    start     training begins after `first_step` steps
    step      step `step` took `seconds`, of which `data_seconds` waiting for rows

What lies between the last sign of life of an attempt and the start of the next is downtime, with a step that a kill cut
short. A step is made again if its number was reached before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_SPENT = ("restore", "save", "evaluation")


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a run; a line that a killed rank did not finish is left out, what follows in it is not."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line[max(0, line.rfind('{"event"')) :])
        except ValueError:
            continue


def account(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the time of a run went, in seconds; empty where nothing says.

    Returns:
        `share` of `wall_seconds` that went into steps made for the first time (`first_time_steps`); `seconds` by what
        they went into, which add up to `wall_seconds`; `attempts`, and `recomputed_steps`, how many were made again.
    """
    names = ("steps", "recomputed", "data_wait", "start_up", *_SPENT, "downtime", "other")
    seconds, reached, again, attempts = dict.fromkeys(names, 0.0), 0, 0, 0
    began: float | None = None
    last = starting = 0.0
    launched, before = False, 0.0
    for event in events:
        kind, now = event["event"], event.get("time")
        if now is None:
            continue
        if began is None:
            began = last = now
        if kind == "attempt" or (kind == "boot" and not launched):
            seconds["downtime"] += now - last
            attempts, starting, launched = attempts + 1, now, kind == "attempt"
            before = seconds["restore"]
        elif kind == "spent":
            seconds[event["what"]] += event["seconds"]
        elif kind == "start":
            seconds["start_up"] += now - starting - (seconds["restore"] - before)
            launched = False
        elif kind == "step":
            made_again = event["step"] <= reached
            reached, again = max(reached, event["step"]), again + made_again
            seconds["data_wait"] += event.get("data_seconds") or 0.0
            seconds["recomputed" if made_again else "steps"] += event["seconds"] - (event.get("data_seconds") or 0.0)
        last = max(last, now)
    if began is None or last <= began:
        return {}
    wall = last - began
    seconds["other"] = wall - sum(seconds.values())
    share = seconds["steps"] / wall
    told = {"share": share, "wall_seconds": wall, "attempts": attempts, "first_time_steps": reached}
    return told | {"recomputed_steps": again, "seconds": seconds}
