"""Mistakes of layouts, planted in the ranks of a proof; the oracle is made elsewhere and does not see them.

Each is what a trainer has shipped or could: what is patched, the layout that shows it, and the words of the diagnosis.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.moe.plan import Capacity
from moe_dist.objectives.language_modelling import LossSums
from moe_dist.parallel import dispatch_all_to_all
from moe_dist.parallel import gradients as gradients_module
from moe_dist.parallel.dispatch_by_token import TokenDispatcher
from moe_dist.parallel.gradients import Gradients
from moe_dist.runtime.process import Process
from moe_dist.verify.lattice import Cell, cells_of
from moe_dist.verify.proof import Proof, summary_of

Patch = AbstractContextManager[Any]
RANKS = 4


@dataclass(frozen=True)
class Mistake:
    """A patch, the cells that are run with it, and what the first of them must say."""

    patch: Callable[[], Patch]
    stage: str
    group: str
    words: tuple[str, ...]
    cell: dict[str, Any] = field(default_factory=dict)


def _after_reduce(change: Callable[[Gradients], None]) -> Patch:
    original = Gradients.reduce

    def reduce(self: Gradients) -> None:
        original(self)
        change(self)

    return mock.patch.object(Gradients, "reduce", reduce)


def _scaled(kind: str, factor: Callable[[Gradients], float]) -> Patch:
    def change(gradients: Gradients) -> None:
        for parameter in getattr(gradients, kind):
            parameter.grad.mul_(factor(gradients))

    return _after_reduce(change)


def _shared_scaled_by_tensor_degree() -> Patch:
    original = Gradients.__init__

    def init(self: Any, model: Any, *given: Any) -> None:
        original(self, model, *given)
        self.shared = [p for name, p in model.named_parameters() if ".shared." in name]

    def reduce(self: Any) -> None:
        reduced(self)
        for parameter in self.shared:
            parameter.grad.mul_(self.mesh.layout.tensor)

    reduced = Gradients.reduce
    return mock.patch.multiple(Gradients, __init__=init, reduce=reduce)


def _left_on_their_rank(part: str) -> Patch:
    """Parameters with this in their name are summed over nobody."""
    original = gradients_module.reduction_group

    def reduction_group(model: Any, name: str, mesh: Any) -> Any:
        return mesh.expert_tensor if part in name else original(model, name, mesh)  # of one rank in all layouts here

    return mock.patch.object(gradients_module, "reduction_group", reduction_group)


def _mean_over_micro_batches() -> Patch:
    original = LossSums.total
    return mock.patch.object(LossSums, "total", lambda self, config: original(self, config) / 2)


def _norm_over_all_ranks() -> Patch:
    def norm(self: Gradients) -> Tensor:
        square = gradients_module._square(self.dense + self.experts, torch.device("cpu"))
        return gradients_module.sum_ranks(square, self.mesh.world).sqrt()

    return mock.patch.object(Gradients, "norm", norm)


def _routers_not_updated() -> Patch:
    original = torch.optim.SGD.step

    def step(self: Any) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.shape == (8, 16) and parameter.grad is not None:  # [experts, width]
                parameter.grad.zero_()
        original(self)

    return mock.patch.object(torch.optim.SGD, "step", step)


def _capacity_by_rank() -> Patch:
    original = Capacity.of

    def of(config: Any, training: bool) -> Capacity | None:
        return original(config.model_copy(update={"capacity_group": "rank"}), training)

    return mock.patch.object(Capacity, "of", staticmethod(of))


def _squared(gates_of_rows: Any) -> Any:
    return lambda *given: gates_of_rows(*given).square()


def _unsorted(counts_WL: Tensor) -> Tensor:
    return torch.arange(int(counts_WL.sum()))


WIDE = {"tensor": 1, "expert": 4}
COPIES = {"tensor": 1, "expert": 2}
ALONE = {"tensor": 1, "expert": 1}
CUT = {"tensor": 2, "expert": 2}

MISTAKES: dict[str, Mistake] = {
    "expert gradients over the expert degree": Mistake(
        lambda: _scaled("experts", lambda g: 1 / g.mesh.layout.expert),
        "gradients",
        "experts",
        ("gradients of the experts are exactly 1/4x the oracle's", "4 is the", "expert degree", "router"),
        WIDE,
    ),
    "expert gradients times the expert-data degree": Mistake(
        lambda: _scaled("experts", lambda g: g.mesh.layout.expert_data),
        "gradients",
        "experts",
        ("gradients of the experts are exactly 2x the oracle's", "2 is the", "expert-data degree"),
        COPIES,
    ),
    "dense gradients averaged over ranks": Mistake(
        lambda: _scaled("dense", lambda g: 1 / g.mesh.layout.ranks),
        "gradients",
        "embedding",
        ("embedding, attention, norms, router and shared expert are exactly 1/4x", "number of ranks", "of the experts"),
        COPIES,
    ),
    "expert gradients not summed over copies": Mistake(
        lambda: _left_on_their_rank(".experts."),
        "gradients",
        "experts",
        ("gradients of the experts are wrong by no common factor; ranks hold different values",),
        COPIES,
    ),
    "router gradients left on their rank": Mistake(
        lambda: _left_on_their_rank("router.weight"),
        "gradients",
        "router",
        ("gradients of the router are wrong by no common factor; ranks hold different values", "of the embedding"),
        COPIES,
    ),
    "shared expert scaled by the tensor degree": Mistake(
        _shared_scaled_by_tensor_degree,
        "gradients",
        "shared expert",
        ("gradients of the shared expert are exactly 2x the oracle's", "tensor degree"),
        CUT,
    ),
    "loss is the mean of micro-batches": Mistake(
        _mean_over_micro_batches,
        "gradients",
        "embedding",
        ("exactly 1/2x the oracle's (2 is the number of micro-batches of a rank)", "no group is right"),
        {**ALONE, "micro": 1},
    ),
    "balance from the counts of this rank only": Mistake(
        lambda: mock.patch("moe_dist.parallel.apply.share_counts", lambda model, mesh: None),
        "loss",
        "balance",
        ("balance is",),
        {**COPIES, "scope": "global", "micro": 4},
    ),
    "rows left in order of arrival": Mistake(
        lambda: mock.patch.object(dispatch_all_to_all, "arrange_by_expert", _unsorted),
        "routing",
        "choices",
        ("tokens ask for other experts in MoE layer 1, while the layers before it route alike", "mixed up"),
        {**COPIES, "micro": 4},
    ),
    "capacity counted on a rank": Mistake(
        _capacity_by_rank,
        "routing",
        "drops",
        ("the same choices are made and others dropped in the first MoE layer: look at capacity",),
        {**COPIES, "capacity": "drop by probability", "micro": 4},
    ),
    "gates applied twice": Mistake(
        lambda: mock.patch.object(TokenDispatcher, "gates_of_rows", _squared(TokenDispatcher.gates_of_rows)),
        "loss",
        "cross_entropy",
        ("cross_entropy is", "routing is right: rows are lost, mixed up or weighed wrongly"),
        {**COPIES, "dispatch": "deduplicated", "layers": 1},
    ),
    "norm counts dense parameters once a rank": Mistake(
        _norm_over_all_ranks,
        "gradient norm",
        "grad_norm",
        ("all gradients are right, their global norm is",),
        COPIES,
    ),
    "routers not updated": Mistake(
        _routers_not_updated,
        "weights",
        "router",
        ("gradients and their norm are right, the update of the router is not",),
        COPIES,
    ),
}
# Options that depend on the cut by their definition, which one process must follow micro-batch by micro-batch.
BY_CUT: dict[str, dict[str, Any]] = {
    "running": {"global_balance": "running", "balance_scope": "global"},
    "micro_step": {"global_balance": "micro_step", "balance_scope": "global"},
    "capacity of a rank": {"capacity_group": "rank", "capacity_factor": 0.75, "balance_scope": "global"},
}


def with_moe(config: Config, changes: dict[str, Any]) -> Config:
    moe = config.model.moe.model_copy(update=changes)
    return config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})


def with_layers(config: Config, layers: int) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers})})


def cell_where(cells: list[Cell], tensor: int, expert: int, **wanted: Any) -> Cell:
    """The first cell of all four ranks that is so."""
    for cell in cells:
        layout, batch = cell.layout, cell.batch
        degrees = (layout.ranks, layout.tensor, layout.expert, layout.expert_tensor)
        usual = {"scope": "sequence", "capacity": "as configured", "micro": 2, "dispatch": "all_to_all"}
        found = {"scope": cell.scope, "capacity": cell.capacity, "micro": batch.micro, "dispatch": cell.dispatch}
        asked = {**usual, **wanted}
        if degrees == (RANKS, tensor, expert, 1) and found == asked and batch.name == "even":
            return cell
    raise AssertionError(f"no cell {tensor} {expert} {wanted}")


def proofs(config: Config, folder: Path) -> dict[str, Proof]:
    """A proof of one cell a mistake, and of some cells for each option that depends on the cut."""
    cells = cells_of(config, RANKS, full=True)
    found = {}
    for name, mistake in MISTAKES.items():
        cell = dict(mistake.cell)
        whole = with_layers(config, cell.pop("layers", 2))
        found[name] = Proof(whole, RANKS, [cell_where(cells, **cell)], folder / name)
    for name, changes in BY_CUT.items():
        changed = with_moe(config, changes)
        some = [cell for cell in cells_of(changed, RANKS, full=False) if cell.scope != "sequence"][::6]
        found[name] = Proof(changed, RANKS, some, folder / name)
    return found


def run_planted(config: Config, folder: Path, process: Process) -> dict[str, Any]:
    """Every proof twice: as it is, and with its mistake."""
    result: dict[str, Any] = {"status": "finished"}
    for name, proof in proofs(config, folder).items():
        right = summary_of(list(proof.run(lambda: False)))
        result[name] = {"right": right}
        if name in MISTAKES:
            with MISTAKES[name].patch():
                result[name]["planted"] = summary_of(list(proof.run(lambda: False)))
    return result


def run_lattice_with_mistake(config: Config, folder: Path, process: Process) -> dict[str, Any]:
    """The worker of `moe-dist verify` with expert gradients scaled by the expert degree."""
    from launch.verify_run import run_cells

    with MISTAKES["expert gradients over the expert degree"].patch():
        return run_cells(config, folder, process)
