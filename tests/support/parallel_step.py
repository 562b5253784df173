"""One training step of a parallel model in a gang, and of the whole model in one process, in comparable form."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import Config
from moe_dist.model import Transformer
from moe_dist.model.init import initialise
from moe_dist.model.naming import global_tensors
from moe_dist.moe.randomness import Draw
from moe_dist.objectives.language_modelling import language_modelling_sums
from moe_dist.parallel.apply import parallelize
from moe_dist.parallel.gradients import Gradients
from moe_dist.parallel.layout import Layout, layout_of, ranks_of_node
from moe_dist.parallel.mesh import Mesh, build_mesh
from moe_dist.parallel.zero import share_out
from moe_dist.train.step import Trainee, train_step
from tests.support.models import dtype_of, plain_model
from tests.support.tolerances import relative_error


@dataclass(frozen=True)
class StepProof:
    """What is compared, in the order in which a difference would arise.

    Attributes:
        counts: Demand and served rows, int64 [2, layers, experts].
        scalars: loss, cross_entropy, balance, z, grad_norm.
        gradients: By global name.
        weights: After one step of SGD with learning rate 1, by global name.
    """

    counts: Tensor
    scalars: dict[str, float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def oracle_step(config: Config, rows: Tensor) -> StepProof:
    """The whole batch and all experts in this process, without any code of `parallel` or `train`."""
    model = plain_model(config, config.seed)
    sums = language_modelling_sums(model, rows, Draw(config.seed, 0, 0))
    tokens = rows[:, 1:].numel()
    loss = sums.total(config.model.moe) / tokens
    loss.backward()
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    norm = torch.sqrt(sum(g.double().square().sum() for g in grads.values()))
    scale = min(1.0, config.train.clip_norm / float(norm)) if config.train.clip_norm else 1.0
    counts = torch.stack([torch.stack([getattr(r.plan, k) for r in sums.records]) for k in ("demand_E", "served_E")])
    pieces = list(global_tensors(model))
    scalars = {"loss": loss, "cross_entropy": sums.cross_entropy / tokens, "balance": sums.balance / tokens}
    scalars |= {"z": sums.z / tokens, "grad_norm": norm}
    return StepProof(
        counts=counts,
        scalars={name: float(value.detach()) for name, value in scalars.items()},
        gradients={p.name: p.of(grads[p.parameter]) for p in pieces},
        weights={p.name: p.of(model.get_parameter(p.parameter).detach() - scale * grads[p.parameter]) for p in pieces},
    )


@functools.cache
def mesh_of(layout: Layout) -> Mesh:
    """One mesh a layout and process: groups have threads, and a gang makes hundreds of steps."""
    return build_mesh(layout, timeout_seconds=60)


def parallel_trainee(config: Config, expert: int, optimizer: str = "sgd") -> Trainee:
    """This rank's part of the model; SGD with learning rate 1 shows a wrong gradient scale, Adam would hide it."""
    node = ranks_of_node(config.parallel, {})
    asked = config.parallel.model_copy(update={"expert": expert})
    layout = layout_of(config.model_copy(update={"parallel": asked}), dist.get_world_size(), node)
    mesh = mesh_of(layout)
    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, mesh, config.parallel)
    initialise(model, config.seed, torch.device("cpu"), dtype_of(config))
    if optimizer == "sgd":
        steps: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    else:
        from moe_dist.optim import build_adamw

        steps = build_adamw(model, config.optimizer)
    steps = share_out(steps, model, mesh, config.parallel)
    return Trainee(config, mesh, model, Gradients(model, mesh, config.parallel.overlap_gradients), steps)


def candidate_step(rank: int, config: Config, expert: int, rows_by_rank: list[Tensor]) -> StepProof:
    """The same step as this rank sees it; pieces of other ranks are missing."""
    trainee = parallel_trainee(config, expert)
    scaled = config.optimizer.model_copy(update={"lr": 1.0, "warmup_steps": 0, "min_lr_fraction": 1.0})
    trainee = Trainee(
        config.model_copy(update={"optimizer": scaled}),
        trainee.mesh,
        trainee.model,
        trainee.gradients,
        trainee.optimizer,
    )
    unclipped: dict[str, Tensor] = {}
    pieces = list(global_tensors(trainee.model))
    reduce = trainee.gradients.reduce

    def reduce_and_keep() -> None:
        reduce()
        for piece in pieces:
            unclipped[piece.name] = piece.of(trainee.model.get_parameter(piece.parameter).grad).clone()

    trainee.gradients.reduce = reduce_and_keep  # type: ignore[method-assign]
    figures = train_step(trainee, rows_by_rank[rank], 0)
    names = ("loss", "cross_entropy", "balance", "z", "grad_norm")
    return StepProof(
        counts=torch.stack([figures.demand, figures.served]),
        scalars={name: getattr(figures, name) for name in names},
        gradients=unclipped,
        weights={p.name: p.of(trainee.model.get_parameter(p.parameter).detach()).clone() for p in pieces},
    )


def first_difference(found: list[StepProof], expected: StepProof, tolerance: float) -> str | None:
    """The first thing that differs: routing, loss terms, gradients, norm, updated weights; None where all agree."""
    checks = (
        lambda: _different_counts(found, expected),
        lambda: _different_scalar(found, expected, ("cross_entropy", "balance", "z", "loss"), tolerance),
        lambda: _different_tensor([p.gradients for p in found], expected.gradients, tolerance, "gradient"),
        lambda: _different_scalar(found, expected, ("grad_norm",), tolerance),
        lambda: _different_tensor([p.weights for p in found], expected.weights, tolerance, "weight"),
    )
    return next((difference for check in checks if (difference := check())), None)


def _different_counts(found: list[StepProof], expected: StepProof) -> str | None:
    for rank, proof in enumerate(found):
        if not torch.equal(proof.counts, expected.counts):
            return f"rank {rank}: routing counts"
    return None


def _different_scalar(
    found: list[StepProof], expected: StepProof, names: tuple[str, ...], tolerance: float
) -> str | None:
    for name in names:
        value = expected.scalars[name]
        for rank, proof in enumerate(found):
            if not abs(proof.scalars[name] - value) <= tolerance * max(1e-3, abs(value)):
                return f"rank {rank}: {name} {proof.scalars[name]!r} instead of {value!r}"
    return None


def _different_tensor(
    found: list[dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float, kind: str
) -> str | None:
    for rank, tensors in enumerate(found):
        for name, tensor in tensors.items():
            error = relative_error(tensor, expected[name])
            if not error <= tolerance:
                return f"rank {rank}: {kind} of {name} off by {error:.3g}"
    missing = set(expected) - {name for tensors in found for name in tensors}
    return f"{kind} of {sorted(missing)[0]} held by no rank" if missing else None
