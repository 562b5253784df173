"""Checkpoints in proofs: what a run would continue from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_dist.checkpoint import pieces, store
from moe_dist.checkpoint.load import load_training_state, restore_newest
from moe_dist.checkpoint.manifest import Manifest, read_manifest
from moe_dist.checkpoint.opened import Opened
from moe_dist.checkpoint.save import Saved, save_checkpoint
from moe_dist.train.step import Trainee
from tests.support.models import small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee


def restored(root: Path, trainee: Trainee, report: Callable[[str], None] = print) -> Manifest | None:
    """Fills a rank's trainee from the newest checkpoint that proves whole; entered by all ranks."""

    def fill(path: Path, manifest: Manifest, opens: Callable[[Path], Opened]) -> None:
        load_training_state(path, manifest, trainee.model, trainee.optimizer, opens)

    found = restore_newest(root, trainee.mesh, report, lambda path, manifest: None, fill)
    return found and found[1]


def newest(root: Path) -> tuple[Path, Manifest]:
    """The newest checkpoint by name."""
    path = store.committed(root)[0]
    return path, read_manifest(path)


def one_rank_checkpoint(root: Path, step: int, mark: float | None = None) -> Path:
    """A checkpoint of the small model with AdamW, saved by this process alone.

    Args:
        root: Where it is put.
        step: Updates that it says were made.
        mark: Weights and moments are filled with it; random weights where None.
    """
    with one_rank():
        trainee = parallel_trainee(small_config(), 1, optimizer="adamw")
        pieces.prepare_moments(trainee.optimizer, step)
        if mark is not None:
            for _, tensors in pieces.parameters_here(trainee.model, trainee.optimizer):
                for tensor in tensors.values():
                    tensor.fill_(mark)
        saved = Saved(step, small_config().model_dump(mode="json"), {"cursor": step})
        return save_checkpoint(root, trainee.model, trainee.optimizer, trainee.mesh, saved, keep=2)
