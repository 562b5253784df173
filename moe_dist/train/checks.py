"""Invariants of training: what holds at every step of a right run, whatever the data, the weights and the layout.

| `train.checks` | looks at | collectives |
|---|---|---|
| `light` | counts, graph and gradients of every step, before its weights change | that of the step's tally |
| | the weights that ranks hold, every `train.checks_every_steps` | one gather of a 64-bit number for each tensor |
| `full` | these also at both ends of a run, before its last save | the same |

All ranks judge the same sums or the same numbers, so that a broken rule stops every one of them, with the same words.
A step that is not finite is passed over unjudged, whatever `train.checks` says (`step.py`, `nonfinite.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.errors import TrainingFault
from moe_dist.moe.layer import MoERecord
from moe_dist.moe.router import Router
from moe_dist.parallel.collectives import gather_objects
from moe_dist.parallel.fsdp import local
from moe_dist.train.digests import Piece, digests_here

if TYPE_CHECKING:
    from moe_dist.train.step import StepFigures, Trainee

_ROUTING = "`moe-dist verify` with this config places a mistake of routing or exchange; checkpoints so far are intact"
_GRAPH = "look for .detach(), no_grad or a value that is left out of the sum on the way to the loss; weights are intact"


class Witness:
    """Sees what one rank's graph and gradients show in a step; `off` sees nothing.

    Attributes:
        sums: fp64, to be added up over ranks: `planned`, the rows of the routing plans, `gates` and `routers`, how
            often a gradient other than zero reached those of a layer, and `without_gradient`, a 1 for every parameter
            that got none.
    """

    def __init__(self, trainee: Trainee) -> None:
        self.trainee = trainee
        self.layers = [layer for _, layer in trainee.model.moe_layers()]
        self.parameters = [p for p in trainee.model.parameters() if p.requires_grad]
        self.sums: dict[str, Tensor] = {}
        if trainee.config.train.checks != "off":
            sizes = dict.fromkeys(("planned", "gates", "routers"), len(self.layers))
            sizes["without_gradient"] = len(self.parameters)
            device = trainee.model.embedding.weight.device
            self.sums = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}

    def watch(self, records: Sequence[MoERecord]) -> None:
        """Sees a micro-batch, before its backward pass."""
        if not self.sums:
            return
        for layer, record in enumerate(records):
            self.sums["planned"][layer] += record.plan.slot_N.numel()
            if record.decision.gate_TK.requires_grad:
                record.decision.gate_TK.register_hook(partial(self._gates_reached, layer))

    def reduce(self) -> None:
        """Sums the gradients over ranks, as `Gradients.reduce` does, and sees what was missing and what came out."""
        if not self.sums:
            self.trainee.gradients.reduce()
            return
        missing = [parameter.grad is None for parameter in self.parameters]
        self.sums["without_gradient"] += torch.tensor(missing, device=self.sums["without_gradient"].device)
        self.trainee.gradients.reduce()
        for layer, module in enumerate(self.layers):
            if isinstance(module.router, Router) and module.router.weight.grad is not None:
                self.sums["routers"][layer] += local(module.router.weight.grad).any()

    def judge(self, step: int, figures: StepFigures, total: Mapping[str, Tensor]) -> None:
        """Raises the first broken rule of update number `step` (from 0).

        Args:
            step: Updates made before this one.
            figures: The step over all ranks.
            total: `sums` over all ranks.

        Raises:
            TrainingFault: On every rank alike.
        """
        if not self.sums:
            return
        model = self.trainee.model
        layers = [name for name, _ in model.moe_layers()]
        parameters = [name for name, p in model.named_parameters() if p.requires_grad]
        seen = Seen(f"step {step + 1}", self.trainee, figures, total, layers, parameters)
        for rule in LIGHT:
            for fault in rule(seen):
                raise fault

    def _gates_reached(self, layer: int, grad_TK: Tensor) -> None:
        self.sums["gates"][layer] += grad_TK.any()


@dataclass(frozen=True)
class Seen:
    """A step as all ranks together saw it.

    Attributes:
        step: Its name, for messages.
        trainee: This rank's part, for its config and mesh.
        figures: Its figures.
        total: The sums of all witnesses.
        layers: Names of the layers with experts, in order.
        parameters: Names of what is trained, in order.
    """

    step: str
    trainee: Trainee
    figures: StepFigures
    total: Mapping[str, Tensor]
    layers: Sequence[str]
    parameters: Sequence[str]

    @property
    def moe(self) -> MoEConfig:
        return self.trainee.config.model.moe

    def by_layer(self, *counts: Tensor) -> Iterator[tuple[str, list[int]]]:
        """(place for a message, whole numbers) of every layer; each of the counts has one a layer."""
        for layer, *numbers in zip(self.layers, *(count.tolist() for count in counts), strict=True):
            yield f"{self.step}, {layer}", [int(number) for number in numbers]


def every_choice_is_a_demand(seen: Seen) -> Iterator[TrainingFault]:
    """The demand of a layer is `top_k` experts a token: all of them with expert choice, one or two with GShard."""
    moe, tokens = seen.moe, seen.figures.tokens
    least, most = {"expert_choice": (moe.num_experts,) * 2, "gshard": (1, 2)}.get(moe.router, (moe.top_k,) * 2)
    for where, (asked,) in seen.by_layer(seen.figures.demand.sum(1)):
        if not least * tokens <= asked <= most * tokens:
            each = f"{least}" if least == most else f"{least} to {most}"
            rule = f"each of {tokens} tokens asks for {each} experts, whatever is dropped afterwards"
            yield TrainingFault(where, f"{asked} choices", rule, _ROUTING)


def no_expert_serves_more_than_it_is_asked(seen: Seen) -> Iterator[TrainingFault]:
    """Rows are choices that were kept; without a capacity all are. Choices that are followed were dropped before."""
    dropless = seen.moe.capacity_factor is None and seen.trainee.config.train.routing_replay is None
    for layer, demand_E, served_E in zip(seen.layers, seen.figures.demand, seen.figures.served, strict=True):
        wrong = (served_E != demand_E if dropless else served_E > demand_E).nonzero().flatten().tolist()
        for expert in wrong:
            value = f"{served_E[expert]} rows served, {demand_E[expert]} asked for"
            rule = "without model.moe.capacity_factor all is served" if dropless else "only what is asked is served"
            yield TrainingFault(f"{seen.step}, {layer}, expert {expert}", value, rule, _ROUTING)


def every_row_reaches_an_expert(seen: Seen) -> Iterator[TrainingFault]:
    """The experts of all ranks together compute the rows that are served, and the empty ones of a padded plan."""
    sent = seen.total["planned"] if seen.moe.pad_to_capacity else seen.figures.served.sum(1)
    for where, (computed, served) in seen.by_layer(seen.figures.rank_rows.sum(1), sent):
        if computed != served:
            rule = "the exchange brings every row to one expert, and no other rows"
            fix = f"look at parallel.dispatch={seen.trainee.config.parallel.dispatch}; {_ROUTING}"
            yield TrainingFault(where, f"{computed} rows computed of {served}", rule, fix)


def every_parameter_gets_a_gradient(seen: Seen) -> Iterator[TrainingFault]:
    """A gradient may be zero, as that of experts and ranks without tokens is; where there is none, the graph is cut."""
    ranks = seen.trainee.mesh.layout.ranks
    for name, missing in zip(seen.parameters, seen.total["without_gradient"].tolist(), strict=True):
        if missing:
            value = f"no gradient on {int(missing)} of {ranks} ranks"
            yield TrainingFault(f"{seen.step}, {name}", value, "every parameter takes part in the loss", _GRAPH)


def the_loss_reaches_the_gates(seen: Seen) -> Iterator[TrainingFault]:
    """What the experts return depends on the gate weights, so the language-model loss has a gradient of them."""
    for where, (reached,) in seen.by_layer(seen.total["gates"]):
        if seen.moe.router != "hash" and not reached:
            rule = "the gradient of the gate weights, from the loss through the experts, is not zero for all tokens"
            yield TrainingFault(where, "no gradient on any rank", rule, _GRAPH)


def every_router_learns(seen: Seen) -> Iterator[TrainingFault]:
    """The gradient of a router's weight is not all zero, where something in the config has one."""
    for where, (reached,) in seen.by_layer(seen.total["routers"]):
        if router_learns(seen.moe) and not reached:
            fix = f"scores that no longer differ in any bit or gates that are all 1 teach nothing; {_GRAPH}"
            yield TrainingFault(f"{where}.router.weight", "gradient all zero", "routers learn at every step", fix)


LIGHT = (
    every_choice_is_a_demand,
    no_expert_serves_more_than_it_is_asked,
    every_row_reaches_an_expert,
    every_parameter_gets_a_gradient,
    the_loss_reaches_the_gates,
    every_router_learns,
)


def router_learns(moe: MoEConfig) -> bool:
    """Whether a router must have a gradient by the config's own definitions.

    A hash has no weights. Normalised gates are 1 whatever the scores where a token has one expert, or may have one left
    whose weight is scaled up after drops; then only the router's own terms teach it, where there are any.
    """
    one_left = moe.top_k == 1 or (moe.renormalize_after_drop and moe.capacity_factor is not None)
    has_terms = moe.balance_loss > 0 or moe.group_balance_loss > 0 or moe.z_loss > 0
    return moe.router != "hash" and (has_terms or not (moe.normalize_gates and one_left))


Digests = Mapping[Piece, int]


def check_weights(trainee: Trainee, step: int, now: bool = False) -> None:
    """The weights after `step` updates: every `train.checks_every_steps` of them, with `train.checks=full` also `now`.

    Entered by all ranks.

    Raises:
        TrainingFault: On every rank alike.
    """
    train = trainee.config.train
    due = step > 0 and step % train.checks_every_steps == 0
    if train.checks == "off" or not (due or (train.checks == "full" and (now or step == 0))):
        return
    by_rank = gather_objects(digests_here(trainee.model), trainee.mesh.world)
    allowed = step == 0 and train.equal_experts_at_start
    for rule in (copies_are_identical,) if allowed else (copies_are_identical, experts_differ):
        for fault in rule(f"step {step}", by_rank):
            raise fault


def copies_are_identical(step: str, by_rank: Sequence[Digests]) -> Iterator[TrainingFault]:
    """Ranks that hold the same piece of a parameter or buffer hold the same bits of it."""
    differing: dict[Piece, list[list[int]]] = {}
    for piece in dict.fromkeys(piece for digests in by_rank for piece in digests):
        holders: dict[int, list[int]] = {}
        for rank, digests in enumerate(by_rank):
            if piece in digests:
                holders.setdefault(digests[piece], []).append(rank)
        if len(holders) > 1:
            differing[piece] = sorted(holders.values(), key=lambda ranks: (-len(ranks), ranks))
    for piece, (most, *others) in differing.items():
        more = len(differing) - 1
        as_others = f", as in {more} more tensor{'s' if more > 1 else ''}" if more else ""
        value = (
            f"ranks {', '.join(map(str, others))} differ from ranks {most}{as_others}; {_who_is_wrong(most, others)}"
        )
        fix = (
            "copies drift apart where a gradient is not summed over all of them or an update is not the same: "
            "`moe-dist verify` with this config; continue from a checkpoint before this step"
        )
        yield TrainingFault(f"{step}, {piece}", value, "all ranks that hold a tensor hold the same bits of it", fix)


def _who_is_wrong(most: Sequence[int], others: Sequence[Sequence[int]]) -> str:
    """Whom a vote of the copies names: those that more than half of them outvote."""
    few = sorted(rank for ranks in others for rank in ranks)
    if len(most) > len(few):
        return f"most copies agree, so ranks {few} are wrong"
    return f"no majority of the copies tells which of ranks {sorted([*most, *few])} are wrong"


def experts_differ(step: str, by_rank: Sequence[Digests]) -> Iterator[TrainingFault]:
    """No two experts of a layer, on whatever ranks, have the same weights in everything that a rank holds of them."""
    held: dict[tuple[str, int], dict[int, list[int]]] = {}
    for piece, digest in {piece: digest for digests in by_rank for piece, digest in digests.items()}.items():
        if piece.expert is not None:
            held.setdefault((piece.module, piece.part), {}).setdefault(piece.expert, []).append(digest)
    for (layer, _), weights in held.items():
        first: dict[tuple[int, ...], int] = {}
        for expert in sorted(weights):
            twin = first.setdefault(tuple(weights[expert]), expert)
            if twin != expert:
                value = f"experts {twin} and {expert} have equal weights"
                rule = "the experts of a layer start different and stay so"
                fix = "look at how they were initialised, imported or restored; a new run.dir, or an older checkpoint"
                yield TrainingFault(f"{step}, {layer}", value, rule, fix)
