"""Saving: every rank writes its part, all agree that all succeeded, rank 0 proves coverage and publishes."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint import pieces, store
from moe_dist.checkpoint.agree import Outcome, on_every_rank, on_first_rank
from moe_dist.errors import CheckpointError
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Saved:
    """What is stored beside the tensors.

    Attributes:
        step: Optimizer updates made.
        config: The resolved config as a plain tree.
        data: State of the batches: cursor and fingerprint.
    """

    step: int
    config: dict[str, Any]
    data: dict[str, Any]


def save_checkpoint(
    root: Path, model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh, saved: Saved, keep: int
) -> Path:
    """Writes and publishes one checkpoint; entered by all ranks.

    Raises:
        CheckpointError: On every rank alike, if any rank could not write or a tensor is missing or written twice. What
            was written is removed, and the checkpoints before stay as they are.
    """
    folder = Path(on_first_rank(lambda: str(store.begin(root, saved.step)), mesh).unwrap())
    outcome = _write_and_publish(folder, model, optimizer, mesh, saved)
    if mesh.rank == 0:
        if outcome.problem is None:
            store.prune(root, Path(outcome.value), keep)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return Path(outcome.unwrap())


def _write_and_publish(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh, saved: Saved
) -> Outcome:
    """The path of the published checkpoint, or what went wrong; the same on every rank."""
    owned = pieces.owned_tensors(model, optimizer, mesh)
    written = on_every_rank(lambda: _write_part(folder, owned, mesh), mesh)
    for outcome in written:
        if outcome.problem is not None:
            return outcome
    parts = [outcome.value for outcome in written]

    def publish() -> str:
        _check_coverage(parts, pieces.expected_names(model.config), folder)
        manifest = {"format": store.FORMAT, "parts": parts, "layout": str(mesh.layout)}
        manifest |= {"step": saved.step, "config": saved.config, "data": saved.data}
        return str(store.commit(folder, saved.step, manifest))

    return on_first_rank(publish, mesh)


def _write_part(folder: Path, tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Any]:
    file = folder / f"part-{mesh.rank:05d}-of-{mesh.layout.ranks:05d}.safetensors"
    _check_room(folder, sum(tensor.nbytes for tensor in tensors.values()))
    save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, file)
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": store.file_digest(file),
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in tensors.items()
        },
    }


def _check_room(folder: Path, needed: int) -> None:
    available = shutil.disk_usage(folder).free
    if available < needed:
        fix = "make room; the checkpoints before are intact, and training goes on"
        raise CheckpointError(str(folder), f"{available:,} bytes free", f"this rank's part needs {needed:,} bytes", fix)


def _check_coverage(parts: list[dict[str, Any]], expected: set[str], folder: Path) -> None:
    names = [name for part in parts for name in part["tensors"]]
    missing, unknown = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing or unknown or len(names) != len(set(names)):
        shown = f"missing {missing[:3]}, unknown {unknown[:3]}, {len(names) - len(set(names))} written twice"
        rule = f"the parts hold each of the {len(expected)} tensors of the model and its moments once"
        raise CheckpointError(str(folder), shown, rule, "this is a bug of moe_dist: please report it")
