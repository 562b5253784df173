"""One optimizer update, and everything that is known about it.

Shape letters: n rows of this rank, S sequence, E experts, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.errors import TrainingFault
from moe_dist.model.transformer import Transformer
from moe_dist.moe.balance import balance_sum, max_over_mean
from moe_dist.moe.randomness import Draw
from moe_dist.moe.selection import moved_bias
from moe_dist.objectives.language_modelling import LossSums, language_modelling_sums
from moe_dist.objectives.micro_batch import MicroBatch, counted_tokens
from moe_dist.optim import learning_rate, set_learning_rate
from moe_dist.parallel.collectives import sum_ranks
from moe_dist.parallel.gradients import Gradients
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.checks import Witness
from moe_dist.train.demand import Demand, Replay, count_demand, counts_first, demand_so_far
from moe_dist.train.routing_ledger import Place, RoutingLedger


@dataclass(frozen=True)
class Trainee:
    """What a step works on: the model as cut for this rank, its gradients and its optimizer.

    `ledger` records or prescribes the routing; None does neither. `end_of_text` is the id that ends a document, where
    documents do not see each other; None where they are joined.
    """

    config: Config
    mesh: Mesh
    model: Transformer
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    ledger: RoutingLedger | None = None
    end_of_text: int | None = None


@dataclass(frozen=True)
class StepFigures:
    """The step as the whole run saw it; equal on every rank.

    Attributes:
        loss: Cross-entropy plus balance terms with their coefficients, nats a token.
        cross_entropy: Nats a token.
        balance: Balance term of all layers before its coefficient; the number of layers when perfectly even.
        balance_exact: The same over the whole global batch, whatever the term was asked for; where the global term is
            approximated, `balance_distance` is its error.
        group_balance: Balance term over groups of experts, before its coefficient.
        z: z-loss of all layers before its coefficient.
        grad_norm: Global 2-norm before clipping.
        lr: Learning rate.
        tokens: Counted tokens of the step.
        demand: Assignments asked for, before drops, int64 [layers, experts].
        served: Rows computed, int64 [layers, experts].
        rank_rows: Rows that the experts of each rank computed, int64 [layers, ranks].
        entropy: Mean entropy of the router over counted tokens, nats, by layer.
        bytes_sent: Bytes that ranks sent to each other to bring tokens to experts and back, in all forward passes.
        stop: Some rank was asked to stop.
    """

    loss: float
    cross_entropy: float
    balance: float
    balance_exact: float
    group_balance: float
    z: float
    grad_norm: float
    lr: float
    tokens: int
    demand: Tensor
    served: Tensor
    rank_rows: Tensor
    entropy: list[float]
    bytes_sent: int
    stop: bool

    @property
    def skipped(self) -> bool:
        """The loss or the gradient is not finite, so that the step changed nothing: a fact of sums over all ranks."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))

    @property
    def balance_distance(self) -> float:
        """How far the balance term is from that of the whole global batch."""
        return self.balance - self.balance_exact

    @property
    def dead_experts(self) -> list[int]:
        """Experts that no token asked for, by layer."""
        return (self.demand == 0).sum(1).tolist()

    @property
    def rank_load(self) -> list[float]:
        """Most rows that a rank computed over the mean, by layer; 1 is even."""
        return [max_over_mean(rows_W) for rows_W in self.rank_rows]


def train_step(trainee: Trainee, rows: Tensor, step: int, stop_asked: bool = False) -> StepFigures:
    """Makes update number `step` (from 0) from this rank's rows; entered by all ranks.

    Where the loss or the gradient of the global batch is not finite, no rank changes anything: neither weights, nor
    moments and their count of updates, nor selection biases. All ranks see that in the same sums.

    Args:
        trainee: The model and its optimizer.
        rows: Token ids int64 [n, S+1], below 0 for padding; n may differ between ranks and may be 0.
        step: Updates made before this one.
        stop_asked: Whether this rank was asked to stop; told to all in the figures.

    Raises:
        TrainingFault: An invariant does not hold (`checks.py`); on every rank alike, before any weight changes. Of a
            step that is not finite none is asked.
        LedgerError: The routing to be followed is of another batch, or the routing cannot be recorded.
    """
    config = trainee.config
    trainee.model.train()
    trainee.optimizer.zero_grad(set_to_none=True)
    place, counted = _place_in_batch(rows, trainee.mesh, step)
    ledger = trainee.ledger
    replay = ledger.open_step(rows, place) if ledger else None
    tally, witness = _Tally(trainee, stop_asked), Witness(trainee)
    passes = list(_passes(rows, trainee, Draw(config.seed, step, place.first_row)))
    demand, followed = _decided_before(trainee, passes, replay)
    for number, ((micro_batch, draw), follow) in enumerate(zip(passes, followed, strict=True), start=1):
        with autocast(config, rows.device):
            chunk = config.train.loss_chunk_tokens
            sums = language_modelling_sums(trainee.model, micro_batch, draw, demand, follow, chunk)
        if ledger:
            ledger.keep(sums.records, draw.first_row, rows.shape[1] - 1)
        if number == len(passes):
            trainee.gradients.expect_last()
        witness.watch(sums.records)
        (sums.total(config.model.moe) / counted).backward()
        tally.add(sums)
        if config.model.moe.global_balance == "running":
            demand = demand_so_far(trainee.model, sums.records)
    if ledger:
        ledger.close_step(rows, place)
    witness.reduce()
    grad_norm = float(trainee.gradients.clip(config.train.clip_norm))
    tally.sums |= witness.sums
    figures = tally.figures(counted, grad_norm, learning_rate(step, config.train.steps, config.optimizer))
    if figures.skipped:
        return figures
    witness.judge(step, figures, tally.total)
    set_learning_rate(trainee.optimizer, figures.lr)
    trainee.optimizer.step()
    move_selection_biases(trainee.model, figures.demand)
    return figures


def _place_in_batch(rows: Tensor, mesh: Mesh, step: int) -> tuple[Place, int]:
    """(place of the rows here among those of all ranks that read other rows, in order; tokens of all that count).

    Raises:
        TrainingFault: No token counts; on every rank alike.
    """
    sizes_W2 = torch.zeros(mesh.layout.data, 2, dtype=torch.int64, device=rows.device)
    sizes_W2[mesh.data_place, 0] = len(rows)
    sizes_W2[mesh.data_place, 1] = counted_tokens(rows)
    rows_W, counted_W = zip(*sum_ranks(sizes_W2, mesh.data).tolist(), strict=True)
    if not sum(counted_W):
        fix = "a larger train.global_batch_sequences, or look at the rows of this step: all of them are padding"
        raise TrainingFault(f"step {step + 1}", "no token that counts", "a global batch has a target", fix)
    return Place(step, sum(rows_W[: mesh.data_place]), sum(rows_W)), sum(counted_W)


def _passes(rows: Tensor, trainee: Trainee, draw: Draw) -> Iterator[tuple[MicroBatch, Draw]]:
    """The micro-batches of this rank, each with what names its random numbers; `draw` is that of the first."""
    for part in micro_batches(rows, trainee.config, trainee.mesh.layout.data):
        yield MicroBatch.of(part, trainee.end_of_text), draw
        draw = replace(draw, first_row=draw.first_row + len(part))


def _decided_before(
    trainee: Trainee, passes: list[tuple[MicroBatch, Draw]], replay: Replay | None
) -> tuple[Demand | None, Sequence[Replay | None]]:
    """What the exact global balance term must know before the first micro-batch, and what each of them follows."""
    if not counts_first(trainee.config.model.moe, len(passes)):
        return None, [replay] * len(passes)
    with autocast(trainee.config, passes[0][0].tokens_BS.device):
        return count_demand(trainee.model, passes, trainee.mesh, replay)


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
    """Adds up a step on this rank, and over all ranks in one collective of fp64 (exact for counts below 2^53).

    Attributes:
        sums: What was added up here.
        total: The same over all ranks, once `figures` has asked them.
    """

    def __init__(self, trainee: Trainee, stop_asked: bool) -> None:
        self.mesh = trainee.mesh
        self.moe = trainee.config.model.moe
        self.device = trainee.model.embedding.weight.device
        layers = sum(1 for _ in trainee.model.moe_layers())
        shapes: dict[str, tuple[int, ...]] = {"cross_entropy": (), "balance": (), "group_balance": (), "z": ()}
        shapes |= dict.fromkeys(("demand", "served", "probability"), (layers, self.moe.num_experts))
        shapes |= {"entropy": (layers,), "rank_rows": (layers, self.mesh.layout.ranks), "bytes_sent": (), "stop": ()}
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=self.device) for name, shape in shapes.items()
        }
        self.sums["stop"] += stop_asked
        self.total: dict[str, Tensor] = {}

    def add(self, sums: LossSums) -> None:
        """Adds a micro-batch that is trained on."""
        for name in ("cross_entropy", "balance", "group_balance", "z"):
            # Ranks that share their tokens each know the whole cross-entropy, and their own part of the other terms.
            if name != "cross_entropy" or self.mesh.tensor_place == 0:
                self.sums[name] += getattr(sums, name).detach()
        for layer, record in enumerate(sums.records):
            self.sums["demand"][layer] += record.plan.demand_E
            self.sums["served"][layer] += record.plan.served_E
            self.sums["probability"][layer] += record.probability_E
            self.sums["entropy"][layer] += record.entropy_sum
            self.sums["rank_rows"][layer, self.mesh.rank] += record.journey.rows
            self.sums["bytes_sent"] += record.journey.bytes_sent

    def figures(self, counted: int, grad_norm: float, lr: float) -> StepFigures:
        total = self.total = self._over_all_ranks()
        exact = float(balance_sum(total["probability"], total["demand"]))
        weighed = {"balance": self.moe.balance_loss, "group_balance": self.moe.group_balance_loss, "z": self.moe.z_loss}
        terms = {name: float(total[name]) / counted for name in ("cross_entropy", *weighed)}
        return StepFigures(
            **terms,
            loss=terms["cross_entropy"] + sum(weight * terms[name] for name, weight in weighed.items()),
            balance_exact=exact / counted,
            grad_norm=grad_norm,
            lr=lr,
            tokens=counted,
            demand=total["demand"].long(),
            served=total["served"].long(),
            rank_rows=total["rank_rows"].long(),
            entropy=(total["entropy"] / counted).tolist(),
            bytes_sent=int(total["bytes_sent"]),
            stop=bool(total["stop"] > 0),
        )

    def _over_all_ranks(self) -> dict[str, Tensor]:
        """Every sum over all ranks, on the host."""
        flat = sum_ranks(torch.cat([value.flatten() for value in self.sums.values()]), self.mesh.world).cpu()
        parts = flat.split([value.numel() for value in self.sums.values()])
        return {name: part.view(value.shape) for (name, value), part in zip(self.sums.items(), parts, strict=True)}
