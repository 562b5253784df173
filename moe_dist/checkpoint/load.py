"""Loading: the newest checkpoint that proves whole while it is read, cut to whatever layout asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moe_dist.checkpoint import pieces, store
from moe_dist.checkpoint.agree import Outcome, attempt, on_every_rank, on_first_rank
from moe_dist.checkpoint.manifest import OLDER, Manifest, read_manifest
from moe_dist.checkpoint.opened import open_file
from moe_dist.checkpoint.read import Reader, parameters_in
from moe_dist.checkpoint.source import Elsewhere, Opens, Source
from moe_dist.config import Config, ModelConfig, parse_config
from moe_dist.errors import CheckpointError
from moe_dist.model.flops import count_parameters
from moe_dist.model.naming import global_tensors
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.fsdp import local, rows_here
from moe_dist.parallel.mesh import Mesh

Report = Callable[[str], None]
Fill = Callable[[Path, Manifest, Opens], None]


def restore_newest(
    root: Path,
    mesh: Mesh,
    report: Report,
    accept: Callable[[Path, Manifest], None],
    fill: Fill,
    elsewhere: Sequence[Elsewhere] = (),
) -> tuple[Source, Manifest] | None:
    """Fills this rank from the newest state that proves whole on all ranks; entered by all ranks.

    What turns out to be damaged while it is read is reported, and the state before is read over it. Of several after
    the same step, the nearest is taken.

    Args:
        root: Where checkpoints lie.
        mesh: This rank.
        report: Told of those that are left out.
        accept: Raises where a checkpoint is whole but not of this run; nothing older is tried then.
        fill: Reads it, as `load_training_state` does.
        elsewhere: Other places of states.

    Returns:
        What it was, with its manifest; None where there is no checkpoint at all.

    Raises:
        CheckpointError: On every rank alike: it is not of this run, or there are checkpoints and none proves whole:
            nothing may then begin anew in silence.
    """
    sources, damage = _sources(root, mesh, report, elsewhere)
    for source in sources:
        opened = attempt(source.manifest, mesh.rank)
        problem = _first_problem(on_every_rank(lambda: bool(opened.unwrap()), mesh))  # noqa: B023 - called at once
        if problem is None:
            manifest: Manifest = opened.unwrap()
            refused = _first_problem(on_every_rank(lambda: accept(source.path, manifest), mesh))  # noqa: B023
            if refused is not None:
                raise CheckpointError(*refused)
            problem = _first_problem(on_every_rank(lambda: fill(source.path, manifest, source.opens()), mesh))  # noqa: B023
            if problem is None:
                return source, manifest
        report(_left_out(source.path, *problem[:3]))
        damage = damage or (problem if source.key is None else None)
    if damage is not None:
        raise _none_is_whole(root, *damage[:2])
    return None


def _sources(
    root: Path, mesh: Mesh, report: Report, elsewhere: Sequence[Elsewhere]
) -> tuple[list[Source], tuple[str, str, str, str] | None]:
    """All states that may be whole, newest first, as rank 0 sees them; and why a lasting place's are not known."""
    unknown = None
    names = on_first_rank(lambda: [path.name for path in store.committed(root)], mesh).unwrap()
    found = [_on_disk(root / name) for name in names]
    for place in elsewhere:
        told = on_first_rank(place.find, mesh)
        if told.problem is not None:
            report(f"what is in {place.name} is not known: {told.error()}")
            unknown = unknown or ((place.name, *told.problem[1:]) if place.lasting else None)
        found += [place.source(value) for value in told.value or []]
    return sorted(found, key=lambda source: (-source.step, source.distance)), unknown


def _on_disk(path: Path) -> Source:
    return Source(path, store.step_of(path), 1, lambda: read_manifest(path), lambda: open_file)


def load_newest_model(root: Path, device: torch.device, report: Report) -> tuple[Transformer, Manifest]:
    """A whole plain model, in one process, from the newest checkpoint whose weights prove whole.

    Raises:
        CheckpointError: There is none.
    """
    first: CheckpointError | None = None
    for path in store.committed(root):
        try:
            manifest = read_manifest(path)
            return load_model(path, manifest, device), manifest
        except CheckpointError as error:
            report(_left_out(path, error.where, str(error.value), error.rule))
            first = first or error
    if first is not None:
        raise _none_is_whole(root, first.where, str(first.value))
    raise CheckpointError(str(root), "no checkpoint", "there is a checkpoint of the run", "train the run first")


def load_training_state(
    path: Path,
    manifest: Manifest,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    opens: Opens = open_file,
) -> None:
    """Fills the weights, moments and buffers held here, whatever layout wrote them; reads no more than these.

    Raises:
        CheckpointError: A tensor is missing, unexpected, damaged, or of another shape or type.
    """
    check_names(path, manifest, model.config)
    pieces.prepare_moments(optimizer, manifest.step)
    begins = _begins(manifest)
    with Reader(path, manifest, True, opens) as reader, torch.no_grad():
        for of_parameter, tensors in pieces.parameters_here(model, optimizer):
            for kind, held in tensors.items():
                here, rows = local(held), rows_here(held) if held.ndim else range(1)
                if begins and kind in pieces.MOMENTS:
                    here.zero_()
                    continue
                for piece in of_parameter:
                    name = f"{kind}/{piece.name}"
                    if piece.index is not None and piece.index in rows:
                        reader.copy(name, here[piece.index - rows.start], piece.cut)
                    elif piece.index is None:
                        reader.copy(name, here, piece.cut, rows if held.ndim else None)
        for name, buffer in pieces.buffers_here(model).items():
            reader.copy(name, buffer)


def load_model(path: Path, manifest: Manifest, device: torch.device) -> Transformer:
    """A whole plain model, in one process, from a checkpoint and its proven manifest.

    Raises:
        CheckpointError: A tensor is missing, damaged, or has another shape or type.
    """
    config = check_complete(path, manifest)
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to_empty(device=device)
    if config.train.precision == "fp64":
        model.to(torch.float64)
    with Reader(path, manifest, beside=True) as reader, torch.no_grad():
        for piece in global_tensors(model):
            reader.copy(f"model/{piece.name}", piece.of(model.get_parameter(piece.parameter).detach()))
        for name, buffer in pieces.buffers_here(model).items():
            reader.copy(name, buffer)
    return model.eval()


def check_names(path: Path, manifest: Manifest, config: ModelConfig) -> None:
    """That a checkpoint holds the tensors of a model and no others; imported weights have no moments.

    Raises:
        CheckpointError: It does not.
    """
    expected, found = set(pieces.expected_shapes(config)), manifest.tensors.keys()
    if _begins(manifest):
        expected = {name for name in expected if name.startswith("model/")}
    for what, names in (("missing", sorted(expected - found)), ("unexpected", sorted(found - expected))):
        if names:
            shown = f"{what}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            rule = "the checkpoint holds every tensor of the model and its moments, and no other"
            raise CheckpointError(str(path), shown, rule, "use a checkpoint of this model")


def _begins(manifest: Manifest) -> bool:
    """Whether training begins with it: weights from elsewhere, before any update, so that moments are zero."""
    return manifest.step == 0 and not any(name.startswith(pieces.MOMENTS) for name in manifest.tensors)


def check_complete(path: Path, manifest: Manifest) -> Config:
    """That a checkpoint holds the model of its own config, whose size is compared before anything of it is made.

    Raises:
        CheckpointError: It does not.
        ConfigError: Its config is none.
    """
    config = parse_config(manifest.config)
    wanted, found = count_parameters(config.model).total, parameters_in(manifest)
    if wanted != found:
        rule = f"the model of its config has {wanted:,} parameters"
        raise CheckpointError(str(path), f"{found:,} parameters", rule, OLDER)
    check_names(path, manifest, config.model)
    return config


def _first_problem(outcomes: list[Outcome]) -> tuple[str, str, str, str] | None:
    return next((outcome.problem for outcome in outcomes if outcome.problem), None)


def _left_out(path: Path, where: str, value: str, rule: str) -> str:
    return f"checkpoint {path.name} is left out: {where}: found {value}; {rule}"


def _none_is_whole(root: Path, where: str, value: str) -> CheckpointError:
    fix = f"restore {root} from a copy, or choose another run.dir to train anew"
    return CheckpointError(where, value, f"one of the checkpoints in {root} proves whole", fix)
