"""The batches of one rank, joined from the data pipeline's loader and what a checkpoint must know of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import BatchLoader, LeftOut, open_training
from data_pipeline.manifest import read_manifest
from data_pipeline.prefetch import Prefetch
from moe_dist.config import Config
from moe_dist.errors import CheckpointError
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.metrics import append_event


class RankBatches:
    """The loader's rows as tensors, made ahead, with its cursor; ranks of a tensor group read the same rows.

    Rows that are left out for a damaged shard are told in progress.jsonl when they are handed out, by one of the ranks
    that read them.
    """

    def __init__(self, config: Config, build_dir: Path, mesh: Mesh) -> None:
        training = open_training(config, build_dir, config.train.steps)
        batch = config.train.global_batch_sequences
        loader = BatchLoader(training, batch, mesh.data_place, mesh.layout.data)
        self.batches = Prefetch(loader, config.data.prefetch_batches)
        self.tokenizer = read_manifest(build_dir).tokenizer_sha256
        self._tells = Path(config.run.dir) if mesh.tensor_place == 0 else None

    def __next__(self) -> torch.Tensor:
        batch = next(self.batches)
        if batch.left_out and self._tells is not None:
            tell_left_out(self._tells, batch.left_out)
        return torch.from_numpy(batch.rows)

    def state_dict(self) -> dict[str, Any]:
        return {**self.batches.state_dict(), "tokenizer_sha256": self.tokenizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state.get("tokenizer_sha256", self.tokenizer)  # checkpoints of format 1 do not say
        if before != self.tokenizer:
            fix = "point data.* at the data the run began with, or start a new run"
            raise CheckpointError("data order: tokenizer", before, f"it is that of this run: {self.tokenizer}", fix)
        if state.keys() - {"tokenizer_sha256"}:
            self.batches.load_state_dict(state)  # else weights from elsewhere, which begin with the first sample

    def close(self) -> None:
        """Ends the thread that makes batches ahead."""
        self.batches.close()


def tell_left_out(run_dir: Path, left_out: Sequence[LeftOut]) -> None:
    """Appends an event `quarantined` for each damaged shard, with the rows that are left out for it."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in left_out:
        told = {"sample": row.sample, "source": row.source, "row": row.row}
        rows.setdefault((row.shard, row.reason), []).append(told)
    for (shard, reason), those in rows.items():
        append_event(run_dir, "quarantined", shard=shard, reason=reason, rows=those)


def count_left_out(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """By damaged shard, the samples that were left out for it; a sample that was read again counts once."""
    samples: dict[str, set[int]] = {}
    for event in events:
        if event["event"] == "quarantined":
            samples.setdefault(event["shard"], set()).update(row["sample"] for row in event["rows"])
    return {shard: len(found) for shard, found in sorted(samples.items())}
