"""Checkpoints in proofs: what a run would continue from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_dist.checkpoint import store
from moe_dist.checkpoint.load import load_training_state, restore_newest
from moe_dist.checkpoint.manifest import Manifest, read_manifest
from moe_dist.train.step import Trainee


def restored(root: Path, trainee: Trainee, report: Callable[[str], None] = print) -> Manifest | None:
    """Fills a rank's trainee from the newest checkpoint that proves whole; entered by all ranks."""

    def fill(path: Path, manifest: Manifest) -> None:
        load_training_state(path, manifest, trainee.model, trainee.optimizer)

    found = restore_newest(root, trainee.mesh, report, lambda path, manifest: None, fill)
    return found and found[1]


def newest(root: Path) -> tuple[Path, Manifest]:
    """The newest checkpoint by name."""
    path = store.committed(root)[0]
    return path, read_manifest(path)
