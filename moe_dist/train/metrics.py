"""The record of a run: Parquet for analysis, TensorBoard for curves, one line of JSON an event for whoever watches.

    <run.dir>/metrics/steps-00000001-00000050.parquet     a row a step, a part a checkpoint
    <run.dir>/tensorboard/                                the same as curves
    <run.dir>/progress.jsonl                              what the progress display follows

Rows reach Parquet before the checkpoint that covers them is published, so that a continued run has the figures of every
step before it. Only rank 0 records. Shape letters: layers of experts, E experts.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.tensorboard import SummaryWriter

from moe_dist.moe.balance import max_violation
from moe_dist.train.step import StepFigures

PROGRESS_FILE = "progress.jsonl"
_MOST_EXPERT_CURVES = 512

_SCHEMA = pa.schema(
    [("step", pa.int64())]
    + [(name, pa.float64()) for name in ("loss", "cross_entropy", "balance", "z", "grad_norm", "lr")]
    + [("tokens", pa.int64())]
    + [(name, pa.float64()) for name in ("seconds", "tokens_per_second", "mfu", "drop_rate")]
    + [("max_vio", pa.list_(pa.float64()))]
    + [(name, pa.list_(pa.list_(pa.int64()))) for name in ("demand", "served")]
)


class Recorder:
    """Writes the record of a run; on other ranks than 0 it keeps rows and writes nothing.

    Args:
        run_dir: The run's directory.
        writes: Whether this rank writes.
        flops_per_token: Model FLOPs of a trained token.
        peak_flops: Measured matrix-product rate of all ranks together, in operations a second.
    """

    def __init__(self, run_dir: Path, writes: bool, flops_per_token: float, peak_flops: float) -> None:
        self.run_dir = run_dir
        self.writes = writes
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.rows: list[dict[str, Any]] = []
        self.evaluations: dict[int, dict[str, float]] = {}
        self.workers: list[dict[str, Any]] = []
        self._unwritten = 0
        self._board: SummaryWriter | None = None
        if writes:
            (run_dir / "metrics").mkdir(parents=True, exist_ok=True)

    def open(self, first_step: int, steps: int, workers: list[dict[str, Any]]) -> None:
        """Takes up the record at a step: rows up to it are kept, later ones (of a run that was cut off) dropped."""
        self.workers = workers
        if not self.writes:
            return
        self.rows = _read_rows(self.run_dir / "metrics", first_step)
        self.evaluations = _read_evaluations(self.run_dir / PROGRESS_FILE, first_step)
        _replace_parts(self.run_dir / "metrics", self.rows)
        self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=first_step + 1)
        self.event("start", time=time.time(), first_step=first_step, steps=steps, ranks=len(workers), workers=workers)

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line to the progress file."""
        if not self.writes:
            return
        with (self.run_dir / PROGRESS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": kind, **fields}) + "\n")

    def step(self, step: int, figures: StepFigures, seconds: float) -> None:
        """Records update number `step` (from 1)."""
        row = step_row(step, figures, seconds)
        row["mfu"] = row["tokens_per_second"] * self.flops_per_token / self.peak_flops
        self.rows.append(row)
        self._unwritten += 1
        if self._board is not None:
            _draw(self._board, row)
        shown = {name: value for name, value in row.items() if name not in ("demand", "served")}
        self.event("step", **{**shown, "max_vio": max(row["max_vio"], default=0.0)})

    def evaluation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Records a held-out evaluation after `step` updates."""
        self.evaluations[step] = {"loss": loss, "bits_per_byte": bits_per_byte}
        if self._board is not None:
            self._board.add_scalar("heldout/loss", loss, step)
            self._board.add_scalar("heldout/bits_per_byte", bits_per_byte, step)
        self.event("evaluate", step=step, loss=loss, bits_per_byte=bits_per_byte)

    def flush(self) -> None:
        """Writes the rows since the last flush as one Parquet part, durably."""
        if self.writes and self._unwritten:
            _write_part(self.run_dir / "metrics", self.rows[-self._unwritten :])
        self._unwritten = 0
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Writes what is left."""
        self.flush()
        if self._board is not None:
            self._board.close()


def step_row(step: int, figures: StepFigures, seconds: float) -> dict[str, Any]:
    """The figures of a step as plain values; MFU is added by whoever knows the peak."""
    asked, served = int(figures.demand.sum()), int(figures.served.sum())
    return {
        "step": step,
        "loss": figures.loss,
        "cross_entropy": figures.cross_entropy,
        "balance": figures.balance,
        "z": figures.z,
        "grad_norm": figures.grad_norm,
        "lr": figures.lr,
        "tokens": figures.tokens,
        "seconds": seconds,
        "tokens_per_second": figures.tokens / seconds,
        "drop_rate": 1 - served / asked if asked else 0.0,
        "max_vio": [max_violation(load) for load in figures.demand],
        "demand": figures.demand.tolist(),
        "served": figures.served.tolist(),
    }


def _draw(board: SummaryWriter, row: dict[str, Any]) -> None:
    step = row["step"]
    for name in ("loss", "cross_entropy", "balance", "z", "grad_norm", "lr", "tokens_per_second", "mfu", "drop_rate"):
        board.add_scalar(f"train/{name}", row[name], step)
    experts = sum(map(len, row["demand"]))
    for layer, (load, violation) in enumerate(zip(row["demand"], row["max_vio"], strict=True)):
        board.add_scalar(f"max_vio/layer_{layer}", violation, step)
        if experts <= _MOST_EXPERT_CURVES:
            for expert, count in enumerate(load):
                board.add_scalar(f"load_layer_{layer}/expert_{expert}", count / max(1, sum(load)), step)


def _write_part(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / f"steps-{rows[0]['step']:08d}-{rows[-1]['step']:08d}.parquet"
    draft = path.with_suffix(".writing")
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), draft, compression="zstd")
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)


def _read_rows(folder: Path, last_step: int) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("steps-*.parquet")):
        rows.update({row["step"]: row for row in pq.read_table(path).to_pylist()})
    return [rows[step] for step in sorted(rows) if step <= last_step]


def _replace_parts(folder: Path, rows: list[dict[str, Any]]) -> None:
    old = set(folder.glob("steps-*"))
    if rows:
        _write_part(folder, rows)
        old.discard(folder / f"steps-{rows[0]['step']:08d}-{rows[-1]['step']:08d}.parquet")
    for path in old:
        path.unlink()


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
