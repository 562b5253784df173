"""What a person sees while something long runs: a bar on a terminal, plain lines anywhere else, on standard error.

Ranks append events to `<run.dir>/progress.jsonl`; the launcher, whichever it is, follows that file. Building data
reports through a callback to the same display.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moe_dist.train import PROGRESS_FILE

_FOLLOW_SECONDS = 0.2
_PLAIN_SECONDS = 10.0
_PLAIN_FRACTION = 0.05


class Display(Protocol):
    """Shows stages with progress, and lines of text."""

    def message(self, text: str) -> None:
        """Shows a line that stays."""

    def update(self, stage: str, done: int, total: int, figures: str = "", unit: str = "", found: int = 0) -> None:
        """Shows how far a stage is; a new stage begins when its name is new.

        Args:
            stage: Its name.
            done: How much is done.
            total: How much there is.
            figures: More to show.
            unit: `bytes` or empty.
            found: How much of `done` was done by an earlier run, and says nothing of the pace.
        """


class Clock:
    """The time left of one stage, from its pace since the first report: the first step also pays for starting up."""

    def __init__(self, done: int) -> None:
        self.started = self._first_time = time.monotonic()
        self._first_done = self._last_done = done

    def left(self, done: int, total: int, found: int = 0) -> str:
        """An estimate like `3m 10s left`, by the pace of what was not found; empty while there is none to tell from."""
        if done < self._last_done:  # workers started again from an older checkpoint
            self._first_done, self._first_time = done, time.monotonic()
        self._last_done = done
        moved = done - found - self._first_done
        if moved <= 0 or done >= total:
            return ""
        seconds = (time.monotonic() - self._first_time) / moved * (total - done)
        return f"{duration(seconds)} left"


class TerminalDisplay:
    """A bar for each stage, drawn in place."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[amount]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._stages: dict[str, tuple[TaskID, Clock]] = {}

    def __enter__(self) -> TerminalDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def message(self, text: str) -> None:
        """Shows a line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)

    def update(self, stage: str, done: int, total: int, figures: str = "", unit: str = "", found: int = 0) -> None:
        """Moves the stage's bar."""
        if stage not in self._stages:
            task = self._progress.add_task(stage, total=total, amount="", figures="", left="")
            self._stages[stage] = (task, Clock(done))
        task, clock = self._stages[stage]
        fields: dict[str, Any] = {"figures": figures, "left": clock.left(done, total, found)}
        fields["amount"] = amount(done, total, unit)
        self._progress.update(task, completed=done, total=total, **fields)


class PlainDisplay:
    """A line at the start and the end of a stage, and every ten seconds or twentieth of it between."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._clocks: dict[str, Clock] = {}
        self._shown: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def message(self, text: str) -> None:
        """Writes the line."""
        print(text, file=self._stream, flush=True)

    def update(self, stage: str, done: int, total: int, figures: str = "", unit: str = "", found: int = 0) -> None:
        """Writes a line when it is time for one."""
        clock = self._clocks.setdefault(stage, Clock(done))
        now = time.monotonic()
        last_time, last_done = self._shown.get(stage, (float("-inf"), -1))
        enough = done < last_done or done - last_done >= max(1, total * _PLAIN_FRACTION)
        if done == last_done or not (now - last_time >= _PLAIN_SECONDS or enough or done >= total):
            return
        self._shown[stage] = (now, done)
        elapsed = f"{duration(now - clock.started)} elapsed"
        parts = (f"{stage} {amount(done, total, unit)}", figures, elapsed, clock.left(done, total, found))
        self.message("  ".join(part for part in parts if part))


@contextlib.contextmanager
def open_display(stream: TextIO | None = None) -> Iterator[Display]:
    """The display that suits the stream, standard error by default."""
    stream = stream or sys.stderr
    display: TerminalDisplay | PlainDisplay
    display = TerminalDisplay(Console(file=stream)) if stream.isatty() else PlainDisplay(stream)
    with display:
        yield display


@contextlib.contextmanager
def follow(run_dir: Path, display: Display) -> Iterator[None]:
    """Shows what is appended to the run's progress file while the block runs."""
    path = run_dir / PROGRESS_FILE
    start = path.stat().st_size if path.exists() else 0
    ended = threading.Event()
    thread = threading.Thread(target=_tail, args=(path, start, display, ended), daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _tail(path: Path, offset: int, display: Display, ended: threading.Event) -> None:
    narrator = Narrator(display)
    rest = b""
    while True:
        last_round = ended.wait(_FOLLOW_SECONDS)
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(offset)
            new = file.read()
            offset += len(new)
            *lines, rest = (rest + new).split(b"\n")
            for line in lines:
                # A rank that was killed may leave half a line, to which the next one appends its own.
                with contextlib.suppress(ValueError, KeyError):
                    narrator.tell(json.loads(line[max(0, line.rfind(b'{"event"')) :]))
        if last_round:
            return


class Narrator:
    """Turns progress events into what the display shows."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._steps = 0
        self._starts = 0
        self._figures = ""
        self._damaged: set[str] = set()  # shards that have been told of

    def tell(self, event: dict[str, Any]) -> None:
        """Shows one event; kinds it does not know are left out."""
        match event.get("event"):
            case "start":
                self._start(event)
            case "step":
                self._figures = figures(event)
                self._display.update("step", event["step"], self._steps, self._figures)
            case "cell":
                self._display.update("cell", event["done"], event["total"], f"{event['different']} different")
            case "evaluate":
                loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
                text = f"step {event['step']}: held-out loss {loss}"
                if event.get("bits_per_byte") is not None:
                    text += f", {event['bits_per_byte']:.3f} bits per byte"
                self._display.message(text)
            case "checkpoint":
                self._display.message(f"step {event['step']}: checkpoint {event['path']}")
            case "skipped":
                where = f"samples {event['first_sample']} to {event['last_sample']}"
                what = f"loss {event['loss']}, gradient norm {event['grad_norm']}"
                self._display.message(f"step {event['step']}: passed over, nothing changed: {what}; {where}")
            case "quarantined":
                self._quarantined(event)
            case "alarm":
                self._display.message(f"warning: {event['text']}")
            case "message":
                self._display.message(str(event["text"]))

    def _quarantined(self, event: dict[str, Any]) -> None:
        """The first rows of each shard; progress.jsonl lists all."""
        if event["shard"] not in self._damaged:
            self._damaged.add(event["shard"])
            what = f"{event['shard']} is damaged ({event['reason']})"
            self._display.message(f"warning: {what}; its rows are left empty, and listed in {PROGRESS_FILE}")

    def _start(self, event: dict[str, Any]) -> None:
        self._starts += 1
        self._steps = event["steps"]
        done = event["first_step"]
        nodes = {worker.get("node") for worker in event.get("workers", [])}
        ranks = f"{event['ranks']} ranks" + (f" on {len(nodes)} nodes" if len(nodes) > 1 else "")
        what = f"going on after step {done} of {self._steps}" if done else f"training {self._steps} steps"
        self._display.message(("workers started again: " if self._starts > 1 else "") + f"{what}, {ranks}")
        self._display.update("step", done, self._steps, self._figures)


def figures(event: dict[str, Any]) -> str:
    """The figures of a step event in one line; those that are missing or unknown are left out."""
    shown = (
        ("loss", "loss {:.4f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "MFU {:.1%}"),
        ("max_vio", "MaxVio {:.2f}"),
        ("drop_rate", "drop {:.1%}"),
    )
    return "  ".join(text.format(event[name]) for name, text in shown if event.get(name) is not None)


def amount(done: int, total: int, unit: str) -> str:
    """How much is done of how much, like `3/20` or `1.2/6.3 MB`."""
    return f"{done / 1e6:.1f}/{total / 1e6:.1f} MB" if unit == "bytes" else f"{done}/{total}"


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m 10s` or `2h 05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
