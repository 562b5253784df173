"""Saving: every rank writes its part, all agree that all succeeded, rank 0 proves coverage and publishes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint import pieces, store
from moe_dist.errors import CheckpointError, MoeDistError
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.collectives import from_first, gather_objects
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
        CheckpointError: On every rank alike, if any rank could not write or a tensor is missing or written twice; the
            checkpoints before stay as they are.
    """
    folder = Path(_from_first(lambda: str(store.begin(root, saved.step)), mesh))
    owned = pieces.owned_tensors(model, optimizer, mesh)
    part = _attempt(lambda: _write_part(folder, owned, mesh), f"rank {mesh.rank}")
    parts = [outcome.unwrap() for outcome in gather_objects(part, mesh.world)]
    expected = pieces.expected_names(model.config)

    def publish() -> str:
        _check_coverage(parts, expected, folder)
        manifest = {"format": store.FORMAT, "parts": parts, "layout": str(mesh.layout)}
        manifest |= {"step": saved.step, "config": saved.config, "data": saved.data}
        final = store.commit(folder, saved.step, manifest)
        store.prune(root, keep)
        return str(final)

    return Path(_from_first(publish, mesh))


def _write_part(folder: Path, tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Any]:
    file = folder / f"part-{mesh.rank:05d}-of-{mesh.layout.ranks:05d}.safetensors"
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


def _check_coverage(parts: list[dict[str, Any]], expected: set[str], folder: Path) -> None:
    names = [name for part in parts for name in part["tensors"]]
    missing, unknown = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing or unknown or len(names) != len(set(names)):
        shown = f"missing {missing[:3]}, unknown {unknown[:3]}, {len(names) - len(set(names))} written twice"
        rule = f"the parts hold each of the {len(expected)} tensors of the model and its moments once"
        raise CheckpointError(str(folder), shown, rule, "this is a bug of moe_dist: please report it")


@dataclass(frozen=True)
class _Outcome:
    """The result of an action, or the four parts of what went wrong, as a value that can be sent to other ranks."""

    value: Any = None
    problem: tuple[str, str, str, str] | None = None

    def unwrap(self) -> Any:
        if self.problem is not None:
            raise CheckpointError(*self.problem)
        return self.value


def _attempt(action: Callable[[], Any], who: str) -> _Outcome:
    try:
        return _Outcome(action())
    except MoeDistError as error:
        return _Outcome(problem=(error.where, str(error.value), error.rule, error.fix))
    except Exception as error:  # noqa: BLE001 - whatever a rank met, all ranks must hear of it
        fix = "make room or correct the path; the checkpoints before are intact"
        return _Outcome(problem=(who, f"{type(error).__name__}: {error}", "every rank writes its part", fix))


def _from_first(action: Callable[[], Any], mesh: Mesh) -> Any:
    """Runs an action on rank 0 and gives its result, or its failure, to all."""
    return from_first(_attempt(action, "rank 0") if mesh.rank == 0 else None, mesh.world).unwrap()
