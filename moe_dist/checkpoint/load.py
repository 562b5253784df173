"""Loading: the newest checkpoint that proves whole, cut to whatever layout asks for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.checkpoint import pieces, store
from moe_dist.config import parse_config
from moe_dist.errors import CheckpointError
from moe_dist.model.naming import global_tensors
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.collectives import from_first
from moe_dist.parallel.mesh import Mesh


def newest_verified(root: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose every byte is as written, with its manifest; damaged ones are reported by name."""
    for path in store.committed(root):
        try:
            return path, store.verify(path)
        except CheckpointError as error:
            report(f"checkpoint {path.name} is left out: {error.where}: found {error.value}; {error.rule}")
    return None


def agree_on_newest(root: Path, mesh: Mesh, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Rank 0 looks and proves, all ranks take what it found."""
    return from_first(newest_verified(root, report) if mesh.rank == 0 else None, mesh.world)


def load_training_state(
    path: Path, manifest: dict[str, Any], model: Transformer, optimizer: torch.optim.Optimizer
) -> None:
    """Fills the weights and moments held here, whatever layout wrote them.

    Raises:
        CheckpointError: A tensor is missing or has another shape or type.
    """
    pieces.prepare_moments(optimizer, manifest["step"])
    with ExitStack() as stack, torch.no_grad():
        read = _reader(path, manifest, stack)
        for piece, tensors in pieces.pieces_here(model, optimizer):
            for kind, target in tensors.items():
                read(f"{kind}/{piece.name}", target)


def load_model(path: Path, device: torch.device) -> tuple[Transformer, dict[str, Any]]:
    """A whole plain model from a checkpoint, in one process, with the manifest.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete.
    """
    manifest = store.verify(path)
    config = parse_config(manifest["config"])
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to_empty(device=device)
    if config.train.precision == "fp64":
        model.to(torch.float64)
    with ExitStack() as stack, torch.no_grad():
        read = _reader(path, manifest, stack)
        for piece in global_tensors(model):
            read(f"model/{piece.name}", piece.of(model.get_parameter(piece.parameter).detach()))
    return model.eval(), manifest


def _reader(path: Path, manifest: dict[str, Any], stack: ExitStack) -> Callable[[str, Tensor], None]:
    """A function that copies a named tensor into a target, opening each part once."""
    part_of = {name: part["file"] for part in manifest["parts"] for name in part["tensors"]}
    opened: dict[str, Any] = {}

    def read(name: str, target: Tensor) -> None:
        if name not in part_of:
            rule = "the checkpoint holds every tensor of the model"
            raise CheckpointError(f"{path}: {name}", "missing", rule, "use a checkpoint of this model")
        file = part_of[name]
        try:
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(path / file, framework="pt"))
            value = opened[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / file}: {name}", error, "the part is readable", "use an older one") from None
        if value.shape != target.shape or value.dtype != target.dtype:
            found = f"{list(value.shape)} {value.dtype}"
            rule = f"the model has {list(target.shape)} {target.dtype}"
            raise CheckpointError(f"{path / file}: {name}", found, rule, "use the config the checkpoint was made with")
        target.copy_(value)

    return read
