"""Every legal layout of a few ranks makes the step of one process with every dispatcher: routing, loss, every gradient,
norm, update."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dist.parallel import dispatch_all_to_all, dispatch_by_token
from moe_dist.parallel import fan as fan_module
from moe_dist.parallel import gradients as gradients_module
from moe_dist.parallel.choices import Arrivals, arrange_arrivals
from moe_dist.parallel.collectives import arrived_rows
from moe_dist.parallel.dispatch_all_to_all import arrange_by_expert
from moe_dist.parallel.dispatch_by_token import TokenDispatcher
from moe_dist.parallel.fan import Fan, fan_in
from tests.support.gang import run_gang
from tests.support.models import dtype_of, random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step
from tests.support.routers import ROUTERS
from tests.support.tolerances import RELATIVE

TOLERANCE = RELATIVE[torch.float64]

DISPATCHERS = ("all_to_all", "all_gather", "deduplicated")
PARALLEL: dict[str, dict[str, Any]] = {
    "two_level, nodes of two": {"dispatch": "two_level", "ranks_per_node": 2},
    "two_level in three parts": {"dispatch": "two_level", "ranks_per_node": 2, "overlap_chunks": 3},
    "deduplicated in two parts": {"dispatch": "deduplicated", "overlap_chunks": 2},
    "all_to_all in two parts": {"dispatch": "all_to_all", "overlap_chunks": 2},
}
# Of four ranks, with every entry above; three rows leave a rank without tokens.
NODES_AND_PARTS = ((6, "micro-batches of one"), (6, "seven experts, five a token, capacity"), (3, "dropless"))
TWO = ("all_to_all", "deduplicated")  # will do where a variant is about something else than rows

# name: (moe options, other options)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropless": ({}, {}),
    "capacity by probability": ({"capacity_factor": 1.0}, {}),
    "capacity by position, renormalised": (
        {"capacity_factor": 1.0, "drop_policy": "position_token_major", "renormalize_after_drop": True},
        {},
    ),
    "global balance": ({"balance_scope": "global", "balance_loss": 0.5}, {"dispatch": TWO}),
    "untied, dense first layer": (
        {},
        {"model": {"tie_embeddings": False, "num_dense_layers": 1}, "dispatch": TWO},
    ),
    "micro-batches of one": ({"capacity_factor": 1.25}, {"micro": 1, "dispatch": TWO}),
    "top-1 raw gate, no shared expert, no clipping": (
        {"top_k": 1, "normalize_gates": False, "shared_expert_width": 0},
        {"clip": None},
    ),
    "seven experts, five a token, capacity": ({"num_experts": 7, "top_k": 5, "capacity_factor": 0.9}, {}),
    "two experts": ({"num_experts": 2, "top_k": 2}, {}),
    "every expert": ({"top_k": 8}, {}),
    "switch, capacity choice-major": (
        {**ROUTERS["switch"], "capacity_factor": 1.0, "drop_policy": "position_choice_major"},
        {},
    ),
    "gshard, capacity": (
        {**ROUTERS["gshard"], "capacity_factor": 1.0, "drop_policy": "position_choice_major"},
        {},
    ),
    "noisy with jitter, weighed ahead": ({**ROUTERS["noisy"], "input_jitter": 0.1, "weigh": "input"}, {}),
    "sigmoid with groups and bias, gelu in a latent space": (
        {**ROUTERS["sigmoid, groups, bias"], "activation": "gelu", "latent_width": 6, "shared_expert_gate": True},
        {},
    ),
    "expert choice, capacity": (ROUTERS["expert choice"], {"prompts": []}),
    "hash, relu, projections again": (
        {**ROUTERS["hash"], "activation": "relu", "recompute_experts": "projections"},
        {},
    ),
    "padded to its capacity": (
        {"capacity_factor": 1.0, "capacity_factor_eval": 1.0, "pad_to_capacity": True, "backend": "batched"},
        {"dispatch": ("all_to_all",)},
    ),
    "plain experts by autograd": ({"backend": "reference", "recompute_experts": "nothing"}, {"dispatch": TWO}),
    "grouped products in fp32": ({"backend": "grouped"}, {"dispatch": TWO, "precision": "fp32"}),
}


def config_of(variant: str, rows: int, dispatch: str = "all_to_all"):
    moe, other = VARIANTS[variant]
    micro = other.get("micro", rows)
    train = {"global_batch_sequences": rows, "micro_batch_sequences": micro, "clip_norm": other.get("clip", 0.5)}
    train["precision"] = other.get("precision", "fp64")
    parallel = PARALLEL.get(dispatch, {"dispatch": dispatch})
    model = other.get("model", {})
    generate = {"prompts": other["prompts"]} if "prompts" in other else {}
    options = {"balance_loss": 0.1, **moe}
    return small_config(options, train=train, model=model, parallel=parallel, generate=generate)


def cut(rows: Tensor, ranks: int) -> list[Tensor]:
    """The loader's cut: contiguous, sizes differ by at most one."""
    return [rows[len(rows) * r // ranks : len(rows) * (r + 1) // ranks] for r in range(ranks)]


@cache
def expected_of(variant: str, count: int) -> StepProof:
    config = config_of(variant, count)
    if config.model.moe.backend == "grouped":  # judged by plain products
        moe = config.model.moe.model_copy(update={"backend": "reference"})
        config = config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})
    return oracle_step(config, random_rows(count))


Case = tuple[int, int, str, str]  # expert degree, rows, variant, dispatcher


def cases_of(degrees: list[int], rows_counts: list[int]) -> list[Case]:
    """Every dispatcher with every variant; where there is one rank a copy, nothing is exchanged and one of them will
    do for most variants. Four ranks also take nodes and parts."""
    further = [(4, count, variant, name) for count, variant in NODES_AND_PARTS for name in PARALLEL]
    return (further if 4 in degrees else []) + [
        (degree, count, variant, dispatch)
        for degree in degrees
        for count in rows_counts
        for variant, (moe, other) in VARIANTS.items()
        for dispatch in other.get("dispatch", DISPATCHERS)
        if degree <= moe.get("num_experts", 8) and (degree > 1 or dispatch == "all_to_all" or variant == "dropless")
    ]


def all_cases(rank: int, ranks: int, cases: list[Case]) -> dict[Case, StepProof]:
    found = {}
    for degree, count, variant, dispatch in cases:
        config = config_of(variant, count, dispatch)
        found[degree, count, variant, dispatch] = candidate_step(rank, config, degree, cut(random_rows(count), ranks))
    return found


LAYOUTS = {  # ranks: (expert degrees, rows)
    1: ([1], [5]),
    2: ([1, 2], [6, 1]),  # one row on two ranks: one has an empty batch
    3: ([1, 3], [7]),  # eight experts over three ranks: 2, 3, 3; seven: 2, 2, 3
    4: ([1, 2, 4], [6, 3]),
}


@cache
def steps_of(ranks: int) -> list[dict[str, dict[Any, StepProof]]]:
    """What every rank of one gang found; the largest gang also takes the planted mistakes."""
    return run_gang(steps_of_rank, ranks, ranks, timeout_seconds=600)  # hundreds of steps, on a busy machine


def steps_of_rank(rank: int, ranks: int) -> dict[str, dict[Any, StepProof]]:
    found: dict[str, dict[Any, StepProof]] = {"cases": all_cases(rank, ranks, cases_of(*LAYOUTS[ranks]))}
    if ranks == 4:
        found |= {"planted": planted(rank), "planted by token": planted_by_token(rank)}
    return found


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_layout_and_dispatcher_makes_the_step_of_one_process(ranks):
    for case in cases_of(*LAYOUTS[ranks]):
        degree, count, variant, dispatch = case
        expected = expected_of(variant, count)
        if "capacity" in variant:
            assert not torch.equal(expected.counts[0], expected.counts[1]), "the case must drop something"
        proofs = [found["cases"][case] for found in steps_of(ranks)]
        tolerance = RELATIVE[dtype_of(config_of(variant, count))]
        difference = first_difference(proofs, expected, tolerance)
        layout = f"expert degree {degree} of {ranks}, {count} rows, {variant}, {dispatch}"
        assert difference is None, f"{layout}: {difference}"


def planted(rank: int) -> dict[str, StepProof]:
    """Steps of four ranks in two expert copies with one mistake each, as peers have shipped them."""
    config = config_of("global balance", 6)
    parts = cut(random_rows(6), 4)
    found = {"none": candidate_step(rank, config, 2, parts)}

    def with_reduction(change: Any) -> Any:
        original = gradients_module.Gradients.reduce

        def reduce(self: Any) -> None:
            original(self)
            change(self)

        return mock.patch.object(gradients_module.Gradients, "reduce", reduce)

    def scale(parameters: list[Any], factor: float) -> None:
        for parameter in parameters:
            parameter.grad.mul_(factor)

    bugs = {
        "expert gradients over the expert degree": with_reduction(lambda g: scale(g.experts, 1 / 2)),
        "dense gradients averaged over ranks": with_reduction(lambda g: scale(g.dense, 1 / 4)),
        "expert gradients not summed over copies": mock.patch.object(
            gradients_module, "reduction_group", _alone("experts", gradients_module.reduction_group)
        ),
        "router gradients left on their rank": mock.patch.object(
            gradients_module, "reduction_group", _alone("router.weight", gradients_module.reduction_group)
        ),
        "balance from the counts of this rank only": mock.patch(
            "moe_dist.parallel.apply.share_counts", _shares_nothing
        ),
        "rows left in order of arrival": mock.patch.object(dispatch_all_to_all, "arrange_by_expert", _unsorted),
        "norm counts dense parameters once a rank": mock.patch.object(
            gradients_module.Gradients, "norm", _norm_over_all
        ),
    }
    for name, bug in bugs.items():
        with bug:
            found[name] = candidate_step(rank, config, 2, parts)
    return found


def _alone(part: str, original: Any) -> Any:
    """Parameters with this in their name are summed over a group of one."""

    def reduction_group(model: Any, name: str, mesh: Any) -> Any:
        return mesh.tensor if part in name else original(model, name, mesh)

    return reduction_group


def _shares_nothing(model: Any, mesh: Any) -> None:
    return None


def _unsorted(counts_WL: Tensor) -> Tensor:
    return torch.arange(int(counts_WL.sum()))


def _norm_over_all(self: Any) -> Tensor:
    square = gradients_module._square(self.dense + self.experts, torch.device("cpu"))
    return gradients_module.sum_ranks(square, self.mesh.world).sqrt()


EXPECTED_DIAGNOSIS = {
    "expert gradients over the expert degree": "experts",
    "dense gradients averaged over ranks": "embedding",
    "expert gradients not summed over copies": "experts",
    "router gradients left on their rank": "router",
    "balance from the counts of this rank only": "balance",
    "rows left in order of arrival": "",  # a wrong expert changes everything from the first loss on
    "norm counts dense parameters once a rank": "grad_norm",
}


def test_planted_mistakes_are_each_caught_where_they_are():
    found = [steps["planted"] for steps in steps_of(4)]
    expected = expected_of("global balance", 6)
    assert first_difference([result["none"] for result in found], expected, TOLERANCE) is None
    for name, where in EXPECTED_DIAGNOSIS.items():
        difference = first_difference([result[name] for result in found], expected, TOLERANCE)
        assert difference is not None, f"not caught: {name}"
        assert where in difference, f"{name}: {difference}"


def planted_by_token(rank: int) -> dict[str, StepProof]:
    """Steps of four ranks in two expert copies, tokens de-duplicated, with one mistake each."""
    config = config_of("seven experts, five a token, capacity", 6, "deduplicated")
    parts = cut(random_rows(6), 4)
    gates_of_rows = TokenDispatcher.gates_of_rows
    bugs = {
        "none": mock.patch.object(TokenDispatcher, "gates_of_rows", gates_of_rows),
        "gate applied twice": mock.patch.object(
            TokenDispatcher, "gates_of_rows", lambda *given: gates_of_rows(*given).square()
        ),
        "gradient of the gates dropped": mock.patch.object(
            TokenDispatcher, "gates_of_rows", lambda *given: gates_of_rows(*given).detach()
        ),
        "gates in order of arrival": mock.patch.object(TokenDispatcher, "gates_of_rows", _gates_unsorted),
        "sum over ranks misses the last": mock.patch.object(TokenDispatcher, "collect", _sum_without_last),
        "rows left in order of arrival": mock.patch.object(dispatch_by_token, "arrange_arrivals", _arrivals_unsorted),
        "gradient of a token from one expert of a rank": mock.patch.object(
            fan_module._FanOut, "backward", staticmethod(_gradient_of_first_row)
        ),
    }
    found = {}
    for name, bug in bugs.items():
        with bug:
            found[name] = candidate_step(rank, config, 2, parts)
    return found


def _gates_unsorted(self: Any, flight: Any) -> Tensor:
    return arrived_rows(flight.gates)


def _sum_without_last(self: Any, flight: Any) -> Tensor:
    home = flight.ticket.home
    return fan_in(arrived_rows(flight.rows), None, Fan(home.source_R, home.passes[:-1], home.place_M))


def _arrivals_unsorted(*given: Any) -> Arrivals:
    right = arrange_arrivals(*given)
    arrival_R = torch.arange(right.order_R.numel())
    rows_M = torch.bincount(right.fan.source_R, minlength=right.fan.place_M.numel())
    return Arrivals(Fan.of(rows_M, arrival_R), arrival_R, right.counts_L)


def _gradient_of_first_row(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
    fan = ctx.fan
    return fan_module.sum_rows(grads[0], None, Fan(fan.source_R, fan.passes[:1], fan.place_M)), None


EXPECTED_DIAGNOSIS_BY_TOKEN = {
    "gate applied twice": "",
    "gradient of the gates dropped": "gradient",
    "gates in order of arrival": "",
    "sum over ranks misses the last": "",
    "rows left in order of arrival": "",
    "gradient of a token from one expert of a rank": "gradient",
}


def test_planted_mistakes_of_the_deduplicated_dispatcher_are_each_caught():
    found = [steps["planted by token"] for steps in steps_of(4)]
    expected = expected_of("seven experts, five a token, capacity", 6)
    assert first_difference([result["none"] for result in found], expected, TOLERANCE) is None
    for name, where in EXPECTED_DIAGNOSIS_BY_TOKEN.items():
        difference = first_difference([result[name] for result in found], expected, TOLERANCE)
        assert difference is not None, f"not caught: {name}"
        assert where in difference, f"{name}: {difference}"


def test_arrange_by_expert_matches_the_table_worked_by_hand():
    assert arrange_by_expert(torch.tensor([[2, 1], [1, 3]])).tolist() == [0, 1, 3, 2, 4, 5, 6]
    assert arrange_by_expert(torch.zeros(2, 3, dtype=torch.int64)).tolist() == []
    assert arrange_by_expert(torch.tensor([[0, 2, 0], [1, 0, 1]])).tolist() == [2, 0, 1, 3]
