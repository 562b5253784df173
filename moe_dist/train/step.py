"""One optimizer update, and everything that is known about it. Shape letters: n rows of this rank, S sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.errors import TrainingFault
from moe_dist.model.transformer import Transformer
from moe_dist.moe.randomness import Draw
from moe_dist.moe.selection import moved_bias
from moe_dist.objectives.language_modelling import LossSums, language_modelling_sums
from moe_dist.optim import learning_rate, set_learning_rate
from moe_dist.parallel.collectives import sum_ranks
from moe_dist.parallel.gradients import Gradients
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.routing_ledger import Place, RoutingLedger


@dataclass(frozen=True)
class Trainee:
    """What a step works on: the model as cut for this rank, its gradients and its optimizer.

    `ledger` records or prescribes the routing; None does neither.
    """

    config: Config
    mesh: Mesh
    model: Transformer
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    ledger: RoutingLedger | None = None


@dataclass(frozen=True)
class StepFigures:
    """The step as the whole run saw it; equal on every rank.

    Attributes:
        loss: Cross-entropy plus balance terms with their coefficients, nats a token.
        cross_entropy: Nats a token.
        balance: Balance term of all layers before its coefficient; the number of layers when perfectly even.
        z: z-loss of all layers before its coefficient.
        grad_norm: Global 2-norm before clipping.
        lr: Learning rate.
        tokens: Counted tokens of the step.
        demand: Assignments asked for, before drops, int64 [layers, experts].
        served: Rows computed, int64 [layers, experts].
        stop: Some rank was asked to stop.
    """

    loss: float
    cross_entropy: float
    balance: float
    z: float
    grad_norm: float
    lr: float
    tokens: int
    demand: Tensor
    served: Tensor
    stop: bool


def train_step(trainee: Trainee, rows: Tensor, step: int, stop_asked: bool = False) -> StepFigures:
    """Makes update number `step` (from 0) from this rank's rows; entered by all ranks.

    Args:
        trainee: The model and its optimizer.
        rows: Token ids int64 [n, S+1]; n may differ between ranks and may be 0.
        step: Updates made before this one.
        stop_asked: Whether this rank was asked to stop; told to all in the figures.

    Raises:
        TrainingFault: The gradient is not finite; on every rank alike, before any weight changes.
        LedgerError: The routing to be followed is of another batch, or the routing cannot be recorded.
    """
    config = trainee.config
    trainee.model.train()
    trainee.optimizer.zero_grad(set_to_none=True)
    first_row, rows_everywhere = _place_in_batch(rows, trainee.mesh)
    length = rows[:, 1:].shape[1]
    counted = rows_everywhere * length
    ledger, place = trainee.ledger, Place(step, first_row, rows_everywhere)
    replay = ledger.open_step(rows, place) if ledger else None
    tally = _Tally(trainee, stop_asked)
    for micro_batch in micro_batches(rows, config, trainee.mesh.layout.ranks):
        with autocast(config, rows.device):
            sums = language_modelling_sums(trainee.model, micro_batch, Draw(config.seed, step, first_row), replay)
        if ledger:
            ledger.keep(sums.records, first_row, length)
        first_row += len(micro_batch)
        (sums.total(config.model.moe) / counted).backward()
        tally.add(sums)
    if ledger:
        ledger.close_step(rows, place)
    trainee.gradients.reduce()
    grad_norm = float(trainee.gradients.clip(config.train.clip_norm))
    figures = tally.figures(counted, grad_norm, learning_rate(step, config.train.steps, config.optimizer))
    if not math.isfinite(grad_norm):
        fix = "a new run.dir with a lower optimizer.lr or train.precision=fp32; this run's checkpoints are intact"
        raise TrainingFault(f"step {step + 1}", f"gradient norm {grad_norm}", "gradients are finite", fix)
    set_learning_rate(trainee.optimizer, figures.lr)
    trainee.optimizer.step()
    move_selection_biases(trainee.model, figures.demand)
    return figures


def _place_in_batch(rows: Tensor, mesh: Mesh) -> tuple[int, int]:
    """(place of the first row here among those of all ranks, in order of rank; rows of all ranks)."""
    rows_W = torch.zeros(mesh.layout.ranks, dtype=torch.int64, device=rows.device)
    rows_W[mesh.rank] = len(rows)
    everywhere = sum_ranks(rows_W, mesh.world).tolist()
    return sum(everywhere[: mesh.rank]), sum(everywhere)


@torch.no_grad()
def move_selection_biases(model: Transformer, demand: Tensor) -> None:
    """Moves every router's selection bias, alike on all ranks.

    Args:
        model: The model as cut for this rank.
        demand: Assignments of the global batch before drops, int64 [layers, experts].
    """
    for (_, layer), demand_E in zip(model.moe_layers(), demand, strict=True):
        bias_E = getattr(layer.router, "selection_bias", None)
        if bias_E is not None:
            bias_E.copy_(moved_bias(bias_E, demand_E.to(bias_E.device), layer.config.bias_update_rate))


def micro_batches(rows: Tensor, config: Config, ranks: int) -> Iterator[Tensor]:
    """Cuts a rank's rows; every rank has the same number of parts, some of them possibly empty."""
    most_rows = math.ceil(config.train.global_batch_sequences / ranks)
    yield from rows.tensor_split(math.ceil(most_rows / config.train.micro_batch_sequences))


def autocast(config: Config, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the config asks for it."""
    if config.train.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


class _Tally:
    """Adds up a step on this rank, and over all ranks in one collective of fp64 (exact for counts below 2^53)."""

    def __init__(self, trainee: Trainee, stop_asked: bool) -> None:
        self.mesh = trainee.mesh
        self.moe = trainee.config.model.moe
        self.device = trainee.model.embedding.weight.device
        layers = sum(1 for _ in trainee.model.moe_layers())
        self.counts = torch.zeros(2, layers, self.moe.num_experts, dtype=torch.int64, device=self.device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.stop = float(stop_asked)

    def add(self, sums: LossSums) -> None:
        for layer, record in enumerate(sums.records):
            self.counts[0, layer] += record.plan.demand_E
            self.counts[1, layer] += record.plan.served_E
        self.sums += torch.stack([t.detach().double() for t in (sums.cross_entropy, sums.balance, sums.z)])

    def figures(self, counted: int, grad_norm: float, lr: float) -> StepFigures:
        stop = torch.tensor([self.stop], dtype=torch.float64, device=self.device)
        everything = sum_ranks(torch.cat([self.sums, stop, self.counts.flatten().double()]), self.mesh.world).cpu()
        cross_entropy, balance, z = (everything[:3] / counted).tolist()
        demand, served = everything[4:].long().view(self.counts.shape)
        return StepFigures(
            loss=cross_entropy + self.moe.balance_loss * balance + self.moe.z_loss * z,
            cross_entropy=cross_entropy,
            balance=balance,
            z=z,
            grad_norm=grad_norm,
            lr=lr,
            tokens=counted,
            demand=demand,
            served=served,
            stop=bool(everything[3] > 0),
        )
