"""The batches of one rank, joined from the data pipeline's loader and what a checkpoint must know of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import BatchLoader
from data_pipeline.manifest import read_manifest
from data_pipeline.packing import open_rows
from moe_dist.config import Config
from moe_dist.errors import CheckpointError
from moe_dist.parallel.mesh import Mesh


class RankBatches:
    """The loader's rows as tensors, with the loader's cursor; ranks of a tensor group read the same rows."""

    def __init__(self, config: Config, build_dir: Path, mesh: Mesh) -> None:
        self.loader = BatchLoader(
            open_rows(config, build_dir, "train"),
            config.data.sequence_length_tokens,
            config.train.global_batch_sequences,
            config.seed,
            mesh.data_place,
            mesh.layout.data,
        )
        self.tokenizer = read_manifest(build_dir).tokenizer_sha256

    def __next__(self) -> torch.Tensor:
        return torch.from_numpy(next(self.loader).rows)

    def state_dict(self) -> dict[str, Any]:
        return {**self.loader.state_dict(), "tokenizer_sha256": self.tokenizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state.get("tokenizer_sha256", self.tokenizer)  # checkpoints of format 1 do not say
        if before != self.tokenizer:
            fix = "point data.* at the data the run began with, or start a new run"
            raise CheckpointError("data order: tokenizer", before, f"it is that of this run: {self.tokenizer}", fix)
        self.loader.load_state_dict(state)
