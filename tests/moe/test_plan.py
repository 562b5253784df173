"""The routing plan against tables worked out by hand, and properties of any plan."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.moe.plan import Capacity, make_plan


def plan_of(experts, probabilities=None, counted=None, shape=(1, 3, 3), capacity=None):
    chosen = torch.tensor(experts)
    weights = torch.ones(chosen.shape) if probabilities is None else torch.tensor(probabilities)
    mask = None if counted is None else torch.tensor(counted)
    return make_plan(chosen, weights, mask, shape, capacity)


def test_plan_dropless_sorts_rows_by_expert_then_token():
    plan = plan_of([[2, 0], [0, 1], [2, 1]])
    assert plan.slot_N.tolist() == [1, 2, 3, 5, 0, 4]
    assert plan.row_TK.tolist() == [[4, 0], [1, 2], [5, 3]]
    assert plan.token_N.tolist() == [0, 1, 1, 2, 0, 2]
    assert plan.served_E.tolist() == plan.demand_E.tolist() == [2, 2, 2]
    assert plan.keeps_all


def test_plan_padding_takes_no_row_and_is_not_demand():
    plan = plan_of([[2, 0], [0, 1], [2, 1]], counted=[[True, False, True]])
    assert plan.slot_N.tolist() == [1, 5, 0, 4]
    assert plan.kept_TK.tolist() == [[True, True], [False, False], [True, True]]
    assert plan.demand_E.tolist() == [1, 1, 2]


# Four tokens of one sequence want expert 0; the capacity is ceil(1.0 * 4 * 1 / 2) = 2 rows.
ALL_TO_ZERO = [[0], [0], [0], [0]]


@pytest.mark.parametrize(
    ("by_probability", "probabilities", "kept"),
    [
        (True, [[0.5], [0.9], [0.6], [0.8]], [1, 3]),
        (False, [[0.5], [0.9], [0.6], [0.8]], [0, 1]),
        (True, [[0.7], [0.7], [0.7], [0.7]], [0, 1]),  # ties go to the earlier token
        (True, [[0.1], [0.2], [0.2], [0.3]], [1, 3]),
    ],
)
def test_plan_full_expert_drops_the_right_tokens(by_probability, probabilities, kept):
    plan = plan_of(ALL_TO_ZERO, probabilities, shape=(1, 4, 2), capacity=Capacity(1.0, 1, by_probability))
    assert plan.slot_N.tolist() == kept
    assert plan.demand_E.tolist() == [4, 0]
    assert plan.served_E.tolist() == [2, 0]


def test_plan_capacity_counts_each_sequence_by_itself():
    plan = plan_of(ALL_TO_ZERO, shape=(2, 2, 2), capacity=Capacity(1.0, 1, False))
    assert plan.slot_N.tolist() == [0, 2]


def test_plan_padding_neither_fills_nor_raises_capacity():
    capacity = Capacity(1.0, 1, True)
    probabilities = [[0.9], [0.5], [0.6], [0.8]]
    plan = plan_of(ALL_TO_ZERO, probabilities, counted=[[False, True, True, False]], shape=(1, 4, 2), capacity=capacity)
    assert plan.slot_N.tolist() == [2]  # two counted tokens: one row, for the more probable of them


def test_plan_minimum_capacity_holds_for_tiny_sequences():
    plan = plan_of([[0], [0]], shape=(1, 2, 8), capacity=Capacity(0.5, 2, False))
    assert plan.served_E.tolist() == [2] + [0] * 7


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.25, 1.5, 2.0])
def test_capacity_rows_are_the_ceiling_of_the_exact_product(factor):
    tokens = torch.arange(0, 200)
    rows = Capacity(factor, 1, True).rows(tokens, 2, 8)
    hundredths = round(factor * 100)
    assert rows.tolist() == [max(1, math.ceil(hundredths * t * 2 / 800 - 1e-12)) for t in tokens.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    length=st.integers(1, 9),
    experts=st.integers(2, 5),
    factor=st.sampled_from([None, 0.5, 1.0, 1.7]),
    by_probability=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_plan_any_routing_keeps_its_invariants(batch, length, experts, factor, by_probability, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch * length, experts, generator=generator)
    chosen = scores.topk(2).indices
    counted = torch.rand(batch, length, generator=generator) > 0.3
    capacity = None if factor is None else Capacity(factor, 1, by_probability)
    plan = make_plan(chosen, scores.gather(1, chosen), counted, (batch, length, experts), capacity)
    expert_of_row = chosen.reshape(-1)[plan.slot_N]
    assert torch.equal(expert_of_row, expert_of_row.sort().values)
    assert torch.equal(torch.bincount(expert_of_row, minlength=experts), plan.served_E)
    assert int(plan.demand_E.sum()) == 2 * int(counted.sum())
    assert int(plan.kept_TK.sum()) == plan.slot_N.numel()
    assert torch.equal(plan.row_TK.reshape(-1)[plan.slot_N], torch.arange(plan.slot_N.numel()))
    assert not bool(plan.kept_TK[~counted.reshape(-1)].any())
    if capacity is not None:
        for b in range(batch):
            limit = int(capacity.rows(counted[b].sum()[None], 2, experts))
            kept = plan.kept_TK.view(batch, length, 2)[b]
            taken = torch.bincount(chosen.view(batch, length, 2)[b][kept], minlength=experts)
            assert int(taken.max()) <= limit
