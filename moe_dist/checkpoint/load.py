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
from moe_dist.checkpoint.agree import on_every_rank, on_first_rank
from moe_dist.config import parse_config
from moe_dist.errors import CheckpointError
from moe_dist.model.naming import Cut, global_tensors
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.fsdp import filling
from moe_dist.parallel.mesh import Mesh


def newest_verified(root: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose every byte is as written, with its manifest; damaged ones are reported by name.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints and none proves whole: nothing may then begin anew in silence.
    """
    problems = []
    for path in store.committed(root):
        try:
            return path, store.verify(path)
        except CheckpointError as error:
            problems.append(error)
            report(_left_out(path, error.where, str(error.value), error.rule))
    if problems:
        raise _none_is_whole(root, problems[0].where, str(problems[0].value))
    return None


def agree_on_newest(root: Path, mesh: Mesh, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The same for all ranks of a run, which share out the parts to be proven; entered by all ranks."""
    names = on_first_rank(lambda: [path.name for path in store.committed(root)], mesh).unwrap()
    first: tuple[str, str] | None = None
    for name in names:
        share = (mesh.rank, mesh.layout.ranks)
        outcomes = on_every_rank(lambda: store.verify(root / name, share), mesh)  # noqa: B023 - called at once
        damage = next((outcome.problem for outcome in outcomes if outcome.problem), None)
        if damage is None:
            return root / name, outcomes[0].value
        report(_left_out(root / name, *damage[:3]))
        first = first or (damage[0], damage[1])
    if first is not None:
        raise _none_is_whole(root, *first)
    return None


def _left_out(path: Path, where: str, value: str, rule: str) -> str:
    return f"checkpoint {path.name} is left out: {where}: found {value}; {rule}"


def _none_is_whole(root: Path, where: str, value: str) -> CheckpointError:
    fix = f"restore {root} from a copy, or choose another run.dir to train anew"
    return CheckpointError(where, value, f"one of the checkpoints in {root} proves whole", fix)


def load_training_state(
    path: Path, manifest: dict[str, Any], model: Transformer, optimizer: torch.optim.Optimizer
) -> None:
    """Fills the weights, moments and buffers held here, whatever layout wrote them.

    Raises:
        CheckpointError: A tensor is missing or has another shape or type.
    """
    pieces.prepare_moments(optimizer, manifest["step"])
    with ExitStack() as stack, torch.no_grad():
        read = _reader(path, manifest, stack)
        for of_parameter, tensors in pieces.parameters_here(model, optimizer):
            for kind, held in tensors.items():
                with filling(held) as target:
                    for piece in of_parameter:
                        read(f"{kind}/{piece.name}", piece.of(target), piece.cut)
        for name, buffer in pieces.buffers_here(model).items():
            read(name, buffer)


def load_model(path: Path, manifest: dict[str, Any], device: torch.device) -> Transformer:
    """A whole plain model, in one process, from a checkpoint and its proven manifest.

    Raises:
        CheckpointError: A tensor is missing or has another shape or type.
    """
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
        for name, buffer in pieces.buffers_here(model).items():
            read(name, buffer)
    return model.eval()


def _reader(path: Path, manifest: dict[str, Any], stack: ExitStack) -> Callable[..., None]:
    """A function that copies a named tensor into a target, opening each part once."""
    part_of = {name: part["file"] for part in manifest["parts"] for name in part["tensors"]}
    opened: dict[str, Any] = {}

    def read(name: str, target: Tensor, cut: Cut | None = None) -> None:
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
        wanted = target.shape if cut is None else cut.whole_shape(target.shape)
        if value.shape != wanted or value.dtype != target.dtype:
            found = f"{list(value.shape)} {value.dtype}"
            rule = f"the model has {list(wanted)} {target.dtype}"
            raise CheckpointError(f"{path / file}: {name}", found, rule, "use the config the checkpoint was made with")
        target.copy_(value if cut is None else cut.take(value))

    return read
