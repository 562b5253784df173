"""One training step in comparable form: of the whole model in one process (oracle), of a rank of many (candidate).

SGD with learning rate 1 shows a wrong gradient scale; Adam, which divides it away, would hide it.
Shape letters: S sequence, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.model.init import initialise
from moe_dist.model.naming import global_buffers, global_tensors, pieces_by_parameter
from moe_dist.model.transformer import Transformer
from moe_dist.moe.ledger import Choices, join
from moe_dist.moe.randomness import Draw
from moe_dist.moe.selection import moved_bias
from moe_dist.objectives.language_modelling import LossSums, language_modelling_sums
from moe_dist.objectives.micro_batch import MicroBatch, counted_tokens
from moe_dist.parallel.apply import parallelize
from moe_dist.parallel.fsdp import filling, whole
from moe_dist.parallel.gradients import Gradients
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.tensor import gather_cut
from moe_dist.parallel.zero import share_out
from moe_dist.train.nonfinite import not_finite
from moe_dist.train.routing_ledger import Place, RoutingLedger
from moe_dist.train.step import Trainee, train_step

Pieces = Sequence[tuple[int, int]]  # (first row, rows) of micro-batches that different ranks run at the same time


@dataclass(frozen=True)
class StepProof:
    """What is compared, in the order in which a difference would arise.

    Attributes:
        first_weights: Before the step, by global name.
        counts: Demand and served rows, int64 [2, layers, experts].
        choices: Of every mixture-of-experts layer, in parts: those of the tokens that were routed here.
        scalars: cross_entropy, balance, group_balance, z, loss, grad_norm.
        gradients: By global name, before clipping.
        weights: After one step of SGD with learning rate 1, by global name; selection biases too.
    """

    first_weights: dict[str, Tensor]
    counts: Tensor
    choices: list[list[Choices]]
    scalars: dict[str, float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]

    def write(self, path: Path) -> None:
        """Keeps the proof as a file of plain tensors."""
        # Not by `asdict`, which copies: of an expert that is a view it would copy the stack of all experts.
        choices = [[vars(part) for part in parts] for parts in self.choices]
        torch.save({**vars(self), "choices": choices}, path)

    @staticmethod
    def read(path: Path) -> StepProof:
        """The inverse of `write`."""
        held = torch.load(path, weights_only=True)
        choices = [[Choices(**part) for part in parts] for parts in held["choices"]]
        return StepProof(**{**held, "choices": choices})


def whole_model(config: Config) -> Transformer:
    """The whole model in this process, with its first weights."""
    with torch.device("meta"):
        model = Transformer(config.model)
    initialise(model, config.seed, torch.device("cpu"), weight_type(config))
    return model


def weight_type(config: Config) -> torch.dtype:
    """Type of the weights: fp64 for proofs."""
    return torch.float64 if config.train.precision == "fp64" else torch.float32


def end_of_text(config: Config) -> int | None:
    """The id that ends a document in the rows of a proof, where documents do not see each other."""
    return 0 if config.data.documents == "separate" else None


def oracle_step(config: Config, rows: Tensor, cut: Sequence[Pieces] | None = None) -> StepProof:
    """The whole batch and all experts in this process, without any code of `parallel` or `train`.

    Args:
        config: The model and its loss.
        rows: The global batch, int64 [rows, S+1].
        cut: The micro-batches of all ranks, by micro-step: for options that by their definition depend on the cut.
            None takes the whole batch through the model at once.
    """
    model, moe, tokens = whole_model(config), config.model.moe, int(counted_tokens(rows))
    cut = cut or [[(0, len(rows))]]
    numbers = [layer.number for _, layer in model.moe_layers()]
    demands = _demands(model, config, rows, cut)
    parts: list[tuple[int, LossSums]] = []
    for pieces, told in zip(cut, demands, strict=True):
        for (first, count), demand in zip(pieces, told, strict=True):
            if count:
                known = None if demand is None else dict(zip(numbers, demand, strict=True))
                batch = MicroBatch.of(rows[first : first + count], end_of_text(config))
                parts.append((first, language_modelling_sums(model, batch, Draw(config.seed, 0, first), known)))
    loss = torch.stack([sums.total(moe) for _, sums in parts]).sum() / tokens
    loss.backward()
    counts = torch.stack([_counts(sums, moe.num_experts) for _, sums in parts]).sum(0)
    length = rows.shape[1] - 1
    chosen = [[Choices.of(record, first * length) for record in sums.records] for first, sums in parts]
    terms = ("cross_entropy", "balance", "group_balance", "z")
    scalars = {name: sum(float(getattr(sums, name).detach()) for _, sums in parts) / tokens for name in terms}
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    norm = float(torch.sqrt(sum((g.double().square().sum() for g in grads.values()), torch.zeros(()))))
    scale = min(1.0, config.train.clip_norm / norm) if config.train.clip_norm else 1.0
    held = list(global_tensors(model))
    # Of each piece by itself: a piece that is a view would keep the stack of all experts.
    before = {p.name: p.of(model.get_parameter(p.parameter).detach()) for p in held}
    weights = {p.name: before[p.name] - scale * p.of(grads[p.parameter]) for p in held}
    return StepProof(
        first_weights=before,
        counts=counts,
        choices=[[join(parts)] for parts in zip(*chosen, strict=True)],
        scalars=scalars | {"loss": float(loss.detach()), "grad_norm": norm},
        gradients={p.name: p.of(grads[p.parameter]) for p in held},
        weights=weights | _moved_biases(model, counts[0]),
    )


def _counts(sums: LossSums, experts: int) -> Tensor:
    """Demand and served rows, int64 [2, layers, E]."""
    plans = [record.plan for record in sums.records]
    rows = [plan.demand_E for plan in plans] + [plan.served_E for plan in plans]
    return torch.stack(rows).view(2, -1, experts) if rows else torch.zeros(2, 0, experts, dtype=torch.int64)


def _demands(model: Transformer, config: Config, rows: Tensor, cut: Sequence[Pieces]) -> list[list[Tensor | None]]:
    """What the global balance term of each piece is told, int64 [layers, E]; None where the piece is all there is."""
    if config.model.moe.balance_scope != "global" or len(cut) * len(cut[0]) == 1:
        return [[None] * len(pieces) for pieces in cut]

    @torch.no_grad()
    def own_demand(first: int, count: int) -> Tensor:
        batch = MicroBatch.of(rows[first : first + count], end_of_text(config))
        sums = language_modelling_sums(model, batch, Draw(config.seed, 0, first))
        return _counts(sums, config.model.moe.num_experts)[0]

    own = [[own_demand(*piece) for piece in pieces] for pieces in cut]
    sums = torch.stack([torch.stack(pieces).sum(0) for pieces in own])
    match config.model.moe.global_balance:
        case "exact":
            return [[sums.sum(0)] * len(pieces) for pieces in own]
        case "micro_step":
            return [[total] * len(pieces) for total, pieces in zip(sums, own, strict=True)]
    # A layer adds its own demand to what a running term is told.
    return [[total - mine for mine in pieces] for total, pieces in zip(sums.cumsum(0), own, strict=True)]


def _moved_biases(model: Transformer, demand: Tensor) -> dict[str, Tensor]:
    """The selection biases after the step, by global name."""
    rate = model.config.moe.bias_update_rate
    paths = [f"{path}.router.selection_bias" for path, _ in model.moe_layers()]
    demands = dict(zip(paths, demand, strict=True))
    return {name: moved_bias(bias_E, demands[name], rate) for name, bias_E in global_buffers(model).items()}


def parallel_trainee(config: Config, mesh: Mesh) -> Trainee:
    """This rank's part of the model under SGD with learning rate 1."""
    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, mesh, config)
    initialise(model, config.seed, torch.device("cpu"), weight_type(config), filling)
    gradients = Gradients(model, mesh, config.parallel.overlap_gradients)
    # One fused operation cannot mix parameters that are shared out over different ranks.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    shared_out = share_out(optimizer, model, mesh, config.parallel)
    return Trainee(config, mesh, model, gradients, shared_out, end_of_text=end_of_text(config))


def candidate_step(trainee: Trainee, rows: Tensor, gradients: dict[str, Tensor] | None = None) -> StepProof:
    """The same step as this rank of many sees it, from its own rows; pieces of other ranks are missing.

    Args:
        trainee: From `parallel_trainee`.
        rows: Of this rank.
        gradients: Is filled where given, so that they are known even if the step fails for them.

    Raises:
        NumericFault: The loss or the gradient is not finite.
    """
    model, config = trainee.model, trainee.config
    constant = config.optimizer.model_copy(update={"lr": 1.0, "warmup_steps": 0, "min_lr_fraction": 1.0})
    judged = config.train.model_copy(update={"checks": "off"})  # the comparison says more than a fault would
    config = config.model_copy(update={"optimizer": constant, "train": judged})
    routing, first_weights = _KeptRouting(config, model), _whole_weights(trainee)
    gradients = {} if gradients is None else gradients
    _keep_gradients(trainee, gradients)
    figures = train_step(replace(trainee, config=config, ledger=routing), rows, 0)
    if figures.skipped:
        raise not_finite(0, figures)
    terms = ("cross_entropy", "balance", "group_balance", "z", "loss", "grad_norm")
    return StepProof(
        first_weights=first_weights,
        counts=torch.stack([figures.demand, figures.served]),
        choices=routing.choices,
        scalars={name: getattr(figures, name) for name in terms},
        gradients=gradients,
        weights=_whole_weights(trainee) | {name: bias.clone() for name, bias in global_buffers(model).items()},
    )


def _keep_gradients(trainee: Trainee, kept: dict[str, Tensor]) -> None:
    """Will keep every gradient as it is after the sums over ranks, before clipping."""
    reduce = trainee.gradients.reduce

    def reduce_and_keep() -> None:
        reduce()
        kept.update(_whole_pieces(trainee, attrgetter("grad")))

    trainee.gradients.reduce = reduce_and_keep  # type: ignore[method-assign]


def _whole_weights(trainee: Trainee) -> dict[str, Tensor]:
    """Every weight as it is now."""
    return _whole_pieces(trainee, lambda parameter: parameter)


@torch.no_grad()
def _whole_pieces(trainee: Trainee, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Something of every parameter, by global name and put together from all that share it; entered by all ranks."""
    found = {}
    for path, pieces in pieces_by_parameter(trainee.model):
        value = whole(of(trainee.model.get_parameter(path)))
        for piece in pieces:
            found[piece.name] = gather_cut(piece, piece.of(value), trainee.mesh).clone()
    return found


class _KeptRouting(RoutingLedger):
    """Keeps what the layers chose, in memory."""

    def __init__(self, config: Config, model: Transformer) -> None:
        super().__init__(config, [layer.number for _, layer in model.moe_layers()])
        self.records = True
        self.choices: list[list[Choices]] = []

    def close_step(self, rows: Tensor, place: Place) -> None:
        self.choices = [list(parts) for parts in zip(*self._parts, strict=True)]
