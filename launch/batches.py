"""The batches of one rank, joined from the data pipeline's loader and what a checkpoint must know of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import BatchLoader, open_training
from data_pipeline.manifest import read_manifest
from data_pipeline.prefetch import Prefetch
from moe_dist.config import Config
from moe_dist.errors import CheckpointError
from moe_dist.parallel.mesh import Mesh


class RankBatches:
    """The loader's rows as tensors, made ahead, with its cursor; ranks of a tensor group read the same rows."""

    def __init__(self, config: Config, build_dir: Path, mesh: Mesh) -> None:
        training = open_training(config, build_dir, config.train.steps)
        batch = config.train.global_batch_sequences
        loader = BatchLoader(training, batch, mesh.data_place, mesh.layout.data)
        self.batches = Prefetch(loader, config.data.prefetch_batches)
        self.tokenizer = read_manifest(build_dir).tokenizer_sha256

    def __next__(self) -> torch.Tensor:
        return torch.from_numpy(next(self.batches).rows)

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
