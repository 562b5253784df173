"""Every legal layout of a few ranks makes the step of one process: routing, loss, every gradient, norm, update."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dist.parallel import expert as expert_module
from moe_dist.parallel import gradients as gradients_module
from moe_dist.parallel.expert import arrange_by_expert
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step

TOLERANCE = 1e-10

# name: (moe options, other options)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropless": ({}, {}),
    "capacity by probability": ({"capacity_factor": 1.0}, {}),
    "capacity by position, renormalised": (
        {"capacity_factor": 1.0, "drop_policy": "position", "renormalize_after_drop": True},
        {},
    ),
    "global balance": ({"balance_scope": "global", "balance_loss": 0.5}, {}),
    "untied, dense first layer": ({}, {"model": {"tie_embeddings": False, "num_dense_layers": 1}}),
    "micro-batches of one": ({"capacity_factor": 1.25}, {"micro": 1}),
    "top-1 raw gate, no shared expert, no clipping": (
        {"top_k": 1, "normalize_gates": False, "shared_expert_width": 0},
        {"clip": None},
    ),
}


def config_of(variant: str, rows: int):
    moe, other = VARIANTS[variant]
    micro = other.get("micro", rows)
    train = {"global_batch_sequences": rows, "micro_batch_sequences": micro, "clip_norm": other.get("clip", 0.5)}
    return small_config({"balance_loss": 0.1, **moe}, train=train, model=other.get("model", {}))


def cut(rows: Tensor, ranks: int) -> list[Tensor]:
    """The loader's cut: contiguous, sizes differ by at most one."""
    return [rows[len(rows) * r // ranks : len(rows) * (r + 1) // ranks] for r in range(ranks)]


def all_cases(rank: int, ranks: int, degrees: list[int], rows_counts: list[int]) -> dict[Any, StepProof]:
    found = {}
    for degree in degrees:
        for count in rows_counts:
            for variant in VARIANTS:
                parts = cut(random_rows(count), ranks)
                found[degree, count, variant] = candidate_step(rank, config_of(variant, count), degree, parts)
    return found


@pytest.mark.parametrize(
    ("ranks", "degrees", "rows_counts"),
    [
        (1, [1], [5]),
        (2, [1, 2], [6, 1]),  # one row on two ranks: one has an empty batch
        (3, [1, 3], [7]),  # eight experts over three ranks: 2, 3, 3
        (4, [1, 2, 4], [6, 3]),
    ],
)
def test_every_layout_makes_the_step_of_one_process(ranks, degrees, rows_counts):
    found = run_gang(all_cases, ranks, ranks, degrees, rows_counts)
    for degree, count, variant in found[0]:
        expected = oracle_step(config_of(variant, count), random_rows(count))
        if "capacity" in variant:
            assert not torch.equal(expected.counts[0], expected.counts[1]), "the case must drop something"
        proofs = [result[degree, count, variant] for result in found]
        difference = first_difference(proofs, expected, TOLERANCE)
        assert difference is None, f"expert degree {degree} of {ranks}, {count} rows, {variant}: {difference}"


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
            gradients_module, "_sum_in_buckets", _sum_only(gradients_module._sum_in_buckets, 4)
        ),
        "balance from the counts of this rank only": mock.patch(
            "moe_dist.parallel.apply.share_counts", _shares_nothing
        ),
        "rows left in order of arrival": mock.patch.object(expert_module, "arrange_by_expert", _unsorted),
        "norm counts dense parameters once a rank": mock.patch.object(
            gradients_module.Gradients, "norm", _norm_over_all
        ),
    }
    for name, bug in bugs.items():
        with bug:
            found[name] = candidate_step(rank, config, 2, parts)
    return found


def _sum_only(original: Any, group_size: int) -> Any:
    def sum_in_buckets(parameters: Any, group: Any) -> None:
        if group.size() == group_size:
            original(parameters, group)

    return sum_in_buckets


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
    "balance from the counts of this rank only": "balance",
    "rows left in order of arrival": "",  # a wrong expert changes everything from the first loss on
    "norm counts dense parameters once a rank": "grad_norm",
}


def test_planted_mistakes_are_each_caught_where_they_are():
    found = run_gang(planted, 4)
    expected = oracle_step(config_of("global balance", 6), random_rows(6))
    assert first_difference([result["none"] for result in found], expected, TOLERANCE) is None
    for name, where in EXPECTED_DIAGNOSIS.items():
        difference = first_difference([result[name] for result in found], expected, TOLERANCE)
        assert difference is not None, f"not caught: {name}"
        assert where in difference, f"{name}: {difference}"


def test_arrange_by_expert_matches_the_table_worked_by_hand():
    assert arrange_by_expert(torch.tensor([[2, 1], [1, 3]])).tolist() == [0, 1, 3, 2, 4, 5, 6]
    assert arrange_by_expert(torch.zeros(2, 3, dtype=torch.int64)).tolist() == []
    assert arrange_by_expert(torch.tensor([[0, 2, 0], [1, 0, 1]])).tolist() == [2, 0, 1, 3]
