"""The record of a run: Parquet for analysis, TensorBoard for curves, one line of JSON an event for whoever watches.

    <run.dir>/metrics/steps-00000001-00000050.parquet     a row a step, a part a checkpoint
    <run.dir>/tensorboard/                                the same as curves
    <run.dir>/progress.jsonl                              what the progress display follows

Rows reach Parquet before the checkpoint that covers them is published, so that a continued run has the figures of every
step before it. Only rank 0 records. Shape letters: layers of experts, E experts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.tensorboard import SummaryWriter

from moe_dist.checkpoint.store import sync_folder
from moe_dist.errors import TrainingFault
from moe_dist.moe.balance import max_violation
from moe_dist.runtime.generation import Fence
from moe_dist.train import PROGRESS_FILE
from moe_dist.train.step import StepFigures

RECENT_STEPS = 20
_MOST_ROWS_IN_MEMORY = 50  # all of them go into every copy of the state in memory
_MOST_EXPERT_CURVES = 512
_LOADS = ("demand", "served")
_PLAIN_FIGURES = ("loss", "cross_entropy", "balance", "z", "grad_norm", "lr", "tokens")
_BALANCE_FIGURES = ("balance_exact", "balance_distance", "group_balance")
# What the progress display gets of a figure that has a value for every layer.
_OVER_LAYERS: dict[str, Callable[[Iterable[float]], float]] = {
    "max_vio": max,
    "dead_experts": sum,
    "entropy": statistics.fmean,
    "rank_load": max,
}

_SCHEMA = pa.schema(
    [("step", pa.int64())]
    + [(name, pa.float64()) for name in ("loss", "cross_entropy", "balance", "z", "grad_norm", "lr")]
    + [("tokens", pa.int64())]
    + [(name, pa.float64()) for name in ("seconds", "tokens_per_second", "mfu", "drop_rate")]
    + [("max_vio", pa.list_(pa.float64()))]
    + [(name, pa.list_(pa.list_(pa.int64()))) for name in ("demand", "served")]
    + [(name, pa.float64()) for name in ("balance_exact", "balance_distance", "group_balance")]
    + [("dead_experts", pa.list_(pa.int64())), ("bytes_sent", pa.int64())]
    + [(name, pa.list_(pa.float64())) for name in ("entropy", "rank_load")]
    + [("skipped", pa.bool_()), ("data_seconds", pa.float64())]
)


class Recorder:
    """Writes the record of a run; on other ranks than 0 it does nothing.

    Args:
        run_dir: The run's directory.
        writes: Whether this rank writes.
        flops_per_token: Model FLOPs of a trained token.
        peak_flops: Measured matrix-product rate of all ranks together, in operations a second.
        fence: Refuses what a process of an older generation would write.

    Attributes:
        rows: The figures of every step so far, without the loads of the experts.
        recent: The last `RECENT_STEPS` steps with their loads.
        evaluations: Held-out scores by step.
        workers: Where each rank runs.
    """

    def __init__(
        self, run_dir: Path, writes: bool, flops_per_token: float, peak_flops: float, fence: Fence | None = None
    ) -> None:
        self.run_dir = run_dir
        self.fence = fence or Fence()
        self.writes = writes
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.rows: list[dict[str, Any]] = []
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self.evaluations: dict[int, dict[str, float]] = {}
        self.workers: list[dict[str, Any]] = []
        self._unwritten: list[dict[str, Any]] = []
        self._untold: list[dict[str, Any]] = []
        self._board: SummaryWriter | None = None

    def open(self, first_step: int, steps: int, workers: list[dict[str, Any]]) -> None:
        """Takes up the record at a step: rows up to it are kept, later ones (of a run that was cut off) dropped."""
        if not self.writes:
            return
        self.workers = workers
        (self.run_dir / "metrics").mkdir(parents=True, exist_ok=True)
        _cut_record(self.run_dir / "metrics", first_step)
        self._take_up(first_step)
        self.rows = _read_rows(self.run_dir / "metrics", without=_LOADS)
        self.recent.extend(_read_rows(self.run_dir / "metrics", from_step=first_step - RECENT_STEPS + 1))
        self.evaluations = _read_evaluations(self.run_dir / PROGRESS_FILE, first_step)
        self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=first_step + 1)
        self.event("start", first_step=first_step, steps=steps, ranks=len(workers), workers=workers)

    def resume(self, rows: list[dict[str, Any]]) -> None:
        """Rows that lay in memory with the state the run goes on from; `open` writes those that no part has."""
        self._unwritten = rows

    def _take_up(self, first_step: int) -> None:
        there = max((last for _, last, _ in _parts(self.run_dir / "metrics")), default=0)
        self._unwritten = [row for row in self._unwritten if there < row["step"] <= first_step]
        self.flush()

    def event(self, kind: str, /, **fields: Any) -> None:
        """Appends one line to the progress file."""
        if self.writes:
            self.fence.check()
            append_event(self.run_dir, kind, **fields)

    def message(self, text: str) -> None:
        """A line for the person who watches."""
        self.event("message", text=text)

    def spent(self, what: str, seconds: float) -> None:
        """Records what took time besides steps (`account.py`)."""
        self.event("spent", what=what, seconds=seconds)

    def step(self, step: int, figures: StepFigures, seconds: float, data_seconds: float = 0.0) -> None:
        """Records step number `step` (from 1), some of whose seconds went into waiting for rows; `tell` shows it."""
        if not self.writes:
            return
        row = step_row(step, figures, seconds) | {"data_seconds": data_seconds}
        row["mfu"] = row["tokens_per_second"] * self.flops_per_token / self.peak_flops
        small = {name: value for name, value in row.items() if name not in _LOADS}
        self.rows.append(small)
        self.recent.append(row)
        self._unwritten.append(row)
        if self._board is not None:
            _draw(self._board, row)
        known = {name: [value for value in row[name] if value is not None] for name in _OVER_LAYERS}
        self._untold.append(small | {name: over(known[name] or [0.0]) for name, over in _OVER_LAYERS.items()})

    def tell(self) -> None:
        """Appends the steps recorded since to the progress file: what is told there is not lost by a lost rank."""
        untold, self._untold = self._untold, []
        for row in untold:
            self.event("step", **row)

    def rows_in_memory(self) -> list[dict[str, Any]]:
        """Rows that no disk has, of not too many steps."""
        if len(self._unwritten) >= _MOST_ROWS_IN_MEMORY:
            self.flush()
        return list(self._unwritten)

    def evaluation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Records a held-out evaluation after `step` updates."""
        self.evaluations[step] = finite({"loss": loss, "bits_per_byte": bits_per_byte})
        if self._board is not None and math.isfinite(loss):
            self._board.add_scalar("heldout/loss", loss, step)
            self._board.add_scalar("heldout/bits_per_byte", bits_per_byte, step)
        self.event("evaluate", step=step, loss=loss, bits_per_byte=bits_per_byte)

    def flush(self) -> None:
        """Writes the rows since the last flush as one Parquet part, durably."""
        self.fence.check()
        if self._unwritten:
            _write_part(self.run_dir / "metrics", self._unwritten)
            self._unwritten = []
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Writes what is left, if it is still wanted; not a step that an exception took before its state was kept."""
        with contextlib.suppress(TrainingFault):
            if sys.exception() is None:
                self.tell()
            self.flush()
        if self._board is not None:
            self._board.close()


def append_event(run_dir: Path, kind: str, /, **fields: Any) -> None:
    """Appends a line with its time to the progress file of a run; a full disk must not stop what is only shown."""
    event = finite({"event": kind, "time": time.time(), **fields})
    line = json.dumps(event, allow_nan=False) + "\n"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / PROGRESS_FILE).open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        print(f"{run_dir / PROGRESS_FILE}: {error}: {line}", file=sys.stderr)


def step_row(step: int, figures: StepFigures, seconds: float) -> dict[str, Any]:
    """The figures of a step as plain values, None for what is not finite; MFU is added by whoever knows the peak."""
    asked, served = int(figures.demand.sum()), int(figures.served.sum())
    row = {
        "step": step,
        **{name: getattr(figures, name) for name in (*_PLAIN_FIGURES, *_BALANCE_FIGURES)},
        "seconds": seconds,
        "tokens_per_second": figures.tokens / seconds,
        "drop_rate": 1 - served / asked if asked else 0.0,
        "max_vio": [max_violation(load) for load in figures.demand],
        "demand": figures.demand.tolist(),
        "served": figures.served.tolist(),
        "dead_experts": figures.dead_experts,
        "entropy": figures.entropy,
        "rank_load": figures.rank_load,
        "bytes_sent": figures.bytes_sent,
        "skipped": figures.skipped,
    }
    return finite(row)


def finite(value: Any) -> Any:
    """Plain values in which a number that is not finite is None, for which JSON has a word and Parquet a place."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: finite(inner) for name, inner in value.items()}
        case list() | tuple():
            return [finite(inner) for inner in value]
    return value


def _draw(board: SummaryWriter, row: dict[str, Any]) -> None:
    step = row["step"]
    for name in (*_PLAIN_FIGURES, *_BALANCE_FIGURES, "tokens_per_second", "mfu", "drop_rate", "bytes_sent"):
        if row[name] is not None:
            board.add_scalar(f"train/{name}", row[name], step)
    experts = sum(map(len, row["demand"]))
    for layer, load in enumerate(row["demand"]):
        for name in _OVER_LAYERS:
            if row[name][layer] is not None:
                board.add_scalar(f"{name}/layer_{layer}", row[name][layer], step)
        if experts <= _MOST_EXPERT_CURVES:
            for expert, count in enumerate(load):
                board.add_scalar(f"load_layer_{layer}/expert_{expert}", count / max(1, sum(load)), step)


def _write_part(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"steps-{rows[0]['step']:08d}-{rows[-1]['step']:08d}.parquet"
    draft = path.with_suffix(".writing")
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), draft, compression="zstd")
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(folder)
    return path


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(first step, last step, file) of every part, in order."""
    return sorted((int(p.stem.split("-")[1]), int(p.stem.split("-")[2]), p) for p in folder.glob("steps-*.parquet"))


def _cut_record(folder: Path, last_step: int) -> None:
    """Drops rows after a step; parts that end before it are left as they are."""
    for first, last, path in _parts(folder):
        if last > last_step:
            kept = [row for row in pq.read_table(path).to_pylist() if row["step"] <= last_step]
            if first <= last_step and kept:
                _write_part(folder, kept)
            path.unlink()


def _read_rows(folder: Path, from_step: int = 0, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    columns = [name for name in _SCHEMA.names if name not in without]
    parts = [path for _, last, path in _parts(folder) if last >= from_step]
    # By the schema: what the parts of an older version lack is read as null.
    rows = [row for path in parts for row in pq.read_table(path, columns=columns, schema=_SCHEMA).to_pylist()]
    return [row for row in rows if row["step"] >= from_step]


def _read_evaluations(path: Path, last_step: int) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a line that a killed rank did not finish
        if event.get("event") == "evaluate" and event["step"] <= last_step:
            found[event["step"]] = {"loss": event["loss"], "bits_per_byte": event["bits_per_byte"]}
    return found
