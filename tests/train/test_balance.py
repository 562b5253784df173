"""Balance and its telemetry under accumulation: any split of one global batch gives the terms, gradients and figures of
one giant batch, though its micro-batches are sorted to be skewed. And mistakes planted in it, each caught."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.moe import balance
from moe_dist.objectives.language_modelling import LossSums, language_modelling_sums
from moe_dist.objectives.micro_batch import MicroBatch
from moe_dist.parallel import expert
from moe_dist.train import demand as demand_module
from moe_dist.train import step as step_module
from moe_dist.train.step import StepFigures, train_step
from tests.support.gang import run_gang
from tests.support.models import LENGTH, plain_model, small_config
from tests.support.parallel_step import (
    StepProof,
    candidate_step,
    first_difference,
    oracle_step,
    parallel_trainee,
)
from tests.support.tolerances import RELATIVE

TOLERANCE = RELATIVE[torch.float64]
ROWS = 7
SIZES = (7, 3, 1)  # micro-batches: the whole at once, unequal ones, single rows
TERMS = {"balance_loss": 0.5, "group_balance_loss": 0.3, "num_groups": 4, "groups_per_token": 3, "input_jitter": 0.1}


def config_of(micro: int, recompute: str = "none", **moe: Any) -> Config:
    train = {"global_batch_sequences": ROWS, "micro_batch_sequences": micro, "clip_norm": None, "recompute": recompute}
    return small_config({"balance_scope": "global", **TERMS, **moe}, train=train)


def sorted_rows() -> Tensor:
    """Rows that each repeat a few neighbouring tokens, in order: every micro-batch is skewed in its own way."""
    few = torch.randint(0, 3, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return few + torch.arange(ROWS)[:, None] * 40


def mine(rank: int, ranks: int, rows: Tensor) -> Tensor:
    return rows[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks]


def balance_alone(self: LossSums, config: Any) -> Tensor:
    return config.balance_loss * self.balance + config.group_balance_loss * self.group_balance


@contextmanager
def figures_kept() -> Iterator[list[StepFigures]]:
    """The figures of the steps made within."""
    kept: list[StepFigures] = []
    original = step_module._Tally.figures

    def figures(self: Any, *given: Any) -> StepFigures:
        kept.append(original(self, *given))
        return kept[-1]

    with mock.patch.object(step_module._Tally, "figures", figures):
        yield kept


@dataclass(frozen=True)
class Found:
    """A step, as the loss sees it and as the telemetry does."""

    proof: StepProof
    figures: StepFigures


def found_step(rank: int, ranks: int, config: Config, degree: int) -> Found:
    with figures_kept() as kept:
        proof = candidate_step(rank, config, degree, [mine(r, ranks, sorted_rows()) for r in range(ranks)])
    return Found(proof, kept[0])


def alone_step(rank: int, ranks: int, config: Config, degree: int) -> Found:
    with mock.patch.object(LossSums, "total", balance_alone):
        return found_step(rank, ranks, config, degree)


@cache
def giant(alone: bool = False) -> StepProof:
    with mock.patch.object(LossSums, "total", balance_alone if alone else LossSums.total):
        return oracle_step(config_of(ROWS), sorted_rows())


LAYOUTS = {1: 1, 2: 2, 3: 3}  # ranks: expert degree


def asked_of_ranks(rank: int, ranks: int) -> dict[str, int]:
    """Collectives that the layers made in a step, by kind of count."""
    found = {}
    for kind in ("exact", "micro_step"):
        with mock.patch.object(expert, "sum_ranks", side_effect=expert.sum_ranks) as asked:
            found_step(rank, ranks, config_of(1, global_balance=kind), LAYOUTS[ranks])
        found[kind] = asked.call_count
    return found


def opposite_ranks(rank: int, ranks: int) -> StepFigures:
    """Two experts, of which the tokens of each rank choose one: every rank is skewed and the whole is even."""
    moe = {"num_experts": 2, "top_k": 1, "normalize_gates": False, "balance_scope": "global", "input_jitter": 0.0}
    config = small_config(moe, model={"num_layers": 1}, train={"global_batch_sequences": 2})
    model = plain_model(config)
    rows = torch.arange(300)[:, None].expand(-1, LENGTH + 1)
    chosen = [
        language_modelling_sums(model, MicroBatch.of(row[None])).records[0].plan.demand_E.argmax() for row in rows[:20]
    ]
    token = next(number for number, choice in enumerate(chosen) if choice == rank)
    return train_step(parallel_trainee(config, 1), rows[token : token + 1], 0)


def all_steps(rank: int, ranks: int) -> dict[str, Any]:
    degree = LAYOUTS[ranks]
    found: dict[str, Any] = {
        "exact": {micro: found_step(rank, ranks, config_of(micro), degree) for micro in SIZES},
        "alone": {micro: alone_step(rank, ranks, config_of(micro), degree) for micro in SIZES},
    }
    kinds = ("micro_step", "running")
    found |= {kind: found_step(rank, ranks, config_of(1, global_balance=kind), degree) for kind in kinds}
    found["micro_batch"] = found_step(rank, ranks, config_of(1, balance_scope="micro_batch"), degree)
    found |= {kind: found_step(rank, ranks, config_of(1, kind), degree) for kind in ("selective", "full")}
    if ranks == 2:
        found |= {"opposite": opposite_ranks(rank, ranks), "asked": asked_of_ranks(rank, ranks)}
        found["planted"] = planted(rank)
    return found


@cache
def steps_of(ranks: int) -> list[dict[str, Any]]:
    return run_gang(all_steps, ranks, ranks)


@pytest.mark.parametrize("ranks", LAYOUTS)
@pytest.mark.parametrize("micro", SIZES)
def test_exact_balance_of_any_split_is_that_of_one_giant_batch(ranks, micro):
    """Traps 2 and 3."""
    for kind in ("exact", "alone"):
        proofs = [found[kind][micro].proof for found in steps_of(ranks)]
        if kind == "exact":
            assert first_difference(proofs, giant(), TOLERANCE) is None
            continue
        wanted = giant(alone=True)
        for name in (name for name in wanted.gradients if "router" in name):
            assert float(wanted.gradients[name].norm()) > 1e-6
            for proof in proofs:
                error = (proof.gradients[name] - wanted.gradients[name]).abs().max() / wanted.gradients[
                    name
                ].abs().max()
                assert error < TOLERANCE, name


def telemetry(figures: StepFigures) -> dict[str, Any]:
    """What no layout, cut or recompute changes: whole numbers equal, others within the tolerance."""
    exact = {"demand": figures.demand.tolist(), "served": figures.served.tolist(), "dead": figures.dead_experts}
    exact |= {"rows": figures.rank_rows.sum(1).tolist(), "tokens": figures.tokens}
    exact["max_vio"] = [balance.max_violation(load) for load in figures.demand]
    near = {"balance_exact": figures.balance_exact, "entropy": figures.entropy}
    return exact | {name: pytest.approx(value, rel=TOLERANCE) for name, value in near.items()}


def same_telemetry(figures: StepFigures, other: StepFigures) -> bool:
    """Of runs that made the same decisions."""
    return telemetry(figures) == {
        **telemetry(other),
        "balance_exact": other.balance_exact,
        "entropy": other.entropy,
    } and [rows.sum() for rows in figures.rank_rows] == [served.sum() for served in figures.served]


def test_telemetry_is_that_of_one_process_for_any_layout_split_and_recompute():
    whole = steps_of(1)[0]["exact"][ROWS].figures
    assert replace(whole, demand=torch.tensor([[0, 3], [0, 0]])).dead_experts == [1, 2]
    assert whole.balance_distance == pytest.approx(0, abs=1e-12) and whole.bytes_sent == 0
    for ranks in LAYOUTS:
        for found in steps_of(ranks):
            for step in found["exact"].values():
                assert same_telemetry(step.figures, whole)
                assert abs(step.figures.balance_distance) < 1e-10
                assert (step.figures.bytes_sent > 0) == (ranks > 1)
                assert len(step.figures.rank_rows[0]) == ranks
        for kind in ("selective", "full"):
            assert all(same_telemetry(found[kind].figures, whole) for found in steps_of(ranks))
            assert first_difference([found[kind].proof for found in steps_of(ranks)], giant(), TOLERANCE) is None


def test_rank_rows_are_those_of_the_experts_that_a_rank_owns():
    figures = steps_of(2)[0]["exact"][1].figures
    assert figures.rank_rows.tolist() == figures.served.unflatten(1, (2, 4)).sum(-1).tolist()
    assert figures.rank_load == [float(rows.max() / rows.double().mean()) for rows in figures.rank_rows]
    assert max(figures.rank_load) > 1


@pytest.mark.parametrize("kind", ["micro_step", "running", "micro_batch"])
def test_approximation_reports_its_true_distance(kind):
    exact = giant().scalars["balance"]
    for ranks in LAYOUTS:
        for found in steps_of(ranks):
            figures = found[kind].figures
            assert figures.balance_exact == pytest.approx(exact, rel=TOLERANCE)
            assert figures.balance_distance == pytest.approx(figures.balance - exact)
            assert abs(figures.balance_distance) > 1e-3
            assert first_difference([found[kind].proof], giant(), TOLERANCE) is not None


def test_exact_balance_asks_no_rank_in_a_layer_and_micro_step_once_a_layer():
    micro_batches, layers = 4, 2
    for found in steps_of(2):
        assert found["asked"] == {"exact": 0, "micro_step": micro_batches * layers}


def test_ranks_that_are_each_skewed_are_even_together():
    """Trap 18."""
    for found in steps_of(2):
        figures = found["opposite"]
        assert figures.demand.tolist() == [[LENGTH, LENGTH]]
        assert balance.max_violation(figures.demand[0]) == 0 and figures.dead_experts == [0]
        assert figures.balance_distance == pytest.approx(0, abs=1e-12)


def first_told_as_exact(model: Any, passes: Any, mesh: Any, replay: Any) -> Any:
    """The demand of the first micro-batch alone."""
    return original_count(model, passes[:1], mesh, replay)[0], [replay] * len(passes)


def counted_twice(model: Any, passes: Any, mesh: Any, replay: Any, tallies: list[Any]) -> Any:
    told = original_count(model, passes, mesh, replay)
    with torch.no_grad():
        for batch, draw in passes:
            tallies[-1].add(language_modelling_sums(model, batch, draw, told[0]))
    return told


def of_another_draw(model: Any, passes: Any, mesh: Any, replay: Any) -> Any:
    others = [(batch, replace(draw, step=draw.step + 1)) for batch, draw in passes]
    return original_count(model, others, mesh, replay)[0], [replay] * len(passes)


def rows_in_the_first_slot(self: Any, sums: LossSums) -> None:
    rank, self.mesh = self.mesh, replace(self.mesh, rank=0)
    original_add(self, sums)
    self.mesh = rank


def mean_in_groups(value_XE: Tensor, num_groups: int) -> Tensor:
    in_groups = value_XE.unflatten(-1, (num_groups, -1))
    return in_groups.mean(-1) if value_XE.is_floating_point() else in_groups.sum(-1)


original_count, original_add = demand_module.count_demand, step_module._Tally.add


def mistakes() -> dict[str, list[Any]]:
    """What is patched, by the name of the mistake."""
    tallies: list[Any] = []

    class Kept(step_module._Tally):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            tallies.append(self)

    def twice(*given: Any) -> Any:
        return counted_twice(*given, tallies)

    def told(change: Any) -> list[Any]:
        return [mock.patch.object(step_module, "count_demand", change)]

    return {
        "none": [],
        "3 counts of the micro-batch taken as exact": [
            mock.patch.object(step_module, "counts_first", lambda *_: False)
        ],
        "3 counts of the first micro-batch taken as exact": told(first_told_as_exact),
        "18 counted first on this rank alone": [
            mock.patch.object(demand_module, "sum_ranks", lambda counts, _: counts)
        ],
        "counted first with other random numbers": told(of_another_draw),
        "4 pass that counts told as trained on": [mock.patch.object(step_module, "_Tally", Kept), *told(twice)],
        "18 rows of every rank in one slot": [mock.patch.object(step_module._Tally, "add", rows_in_the_first_slot)],
        "probabilities of a group averaged": [mock.patch.object(balance, "sum_in_groups", mean_in_groups)],
    }


def planted(rank: int) -> dict[str, Found]:
    found = {}
    for name, patches in mistakes().items():
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            found[name] = found_step(rank, 2, config_of(1), 2)
    return found


CAUGHT_BY_TELEMETRY = {"4 pass that counts told as trained on", "18 rows of every rank in one slot"}


def told_of(name: str, steps: list[dict[str, Found]]) -> str | None:
    """What gives a planted mistake away: the telemetry of the step, or the first tensor that differs."""
    difference = first_difference([step[name].proof for step in steps], giant(), TOLERANCE)
    if name != "none" and name not in CAUGHT_BY_TELEMETRY:
        return difference
    figures, whole = steps[0][name].figures, steps[0]["none"].figures
    same = same_telemetry(figures, whole) and figures.rank_rows.tolist() == whole.rank_rows.tolist()
    return difference or (None if same else "the telemetry of the step")


def test_planted_mistakes_are_each_caught():
    steps = [found["planted"] for found in steps_of(2)]
    assert same_telemetry(steps[0]["none"].figures, steps_of(2)[0]["exact"][ROWS].figures)
    for name in mistakes():
        assert (told_of(name, steps) is None) == (name == "none"), name
