"""The routing plan against tables worked out by hand, and properties of any plan."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.moe.plan import Capacity, make_plan


def plan_of(experts, probabilities=None, counted=None, shape=(1, 3, 3), capacity=None):
    chosen = torch.as_tensor(experts)
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


POLICIES = ("probability", "position_token_major", "position_choice_major")

# Four tokens of one sequence want expert 0; the capacity is ceil(1.0 * 4 * 1 / 2) = 2 rows.
ALL_TO_ZERO = [[0], [0], [0], [0]]


@pytest.mark.parametrize(
    ("policy", "probabilities", "kept"),
    [
        ("probability", [[0.5], [0.9], [0.6], [0.8]], [1, 3]),
        ("position_token_major", [[0.5], [0.9], [0.6], [0.8]], [0, 1]),
        ("probability", [[0.7], [0.7], [0.7], [0.7]], [0, 1]),  # ties go to the earlier token
        ("probability", [[0.1], [0.2], [0.2], [0.3]], [1, 3]),
    ],
)
def test_plan_full_expert_drops_the_right_tokens(policy, probabilities, kept):
    plan = plan_of(ALL_TO_ZERO, probabilities, shape=(1, 4, 2), capacity=Capacity(1.0, 1, policy))
    assert plan.slot_N.tolist() == kept
    assert plan.demand_E.tolist() == [4, 0]
    assert plan.served_E.tolist() == [2, 0]


# Two experts of two rows each; both choices of three tokens: slots 0 to 5.
CROSSED = [[0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("position_token_major", [[True, True], [True, True], [False, False]]),
        # Expert 0 takes the first choices of tokens 0 and 2; expert 1 that of token 1, then the second of token 0.
        ("position_choice_major", [[True, True], [True, False], [True, False]]),
        # Expert 0 is asked with 0.9, 0.3, 0.6; expert 1 with 0.1, 0.7, 0.4.
        ("probability", [[True, False], [True, False], [True, True]]),
    ],
)
def test_plan_crossed_choices_drop_as_worked_by_hand(policy, kept):
    probabilities = [[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]]
    capacity = Capacity(1.0, 1, policy, share=1)  # ceil(3 * 1 / 2) = 2 rows
    plan = plan_of(CROSSED, probabilities, shape=(1, 3, 2), capacity=capacity)
    assert plan.kept_TK.tolist() == kept


def test_plan_choice_not_carried_out_is_no_demand_and_makes_room():
    asks = torch.tensor([[True, False], [True, True], [True, True]])
    chosen, weights = torch.tensor(CROSSED), torch.ones(3, 2)
    capacity = Capacity(1.0, 1, "position_token_major", share=1)
    plan = make_plan(chosen, weights, None, (1, 3, 2), capacity, asks)
    assert plan.demand_E.tolist() == [3, 2]
    assert plan.kept_TK.tolist() == [[True, False], [True, True], [False, True]]


def test_plan_share_counts_an_even_share_apart_from_the_choices():
    plan = plan_of([[0, 1]] * 4, [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]], shape=(1, 4, 2))
    assert plan.keeps_all
    taken = make_plan(
        torch.tensor([[0, 1]] * 4),
        torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]]),
        None,
        (1, 4, 2),
        Capacity(1.0, 1, "probability", share=1),
    )
    assert taken.token_N.tolist() == [0, 2, 1, 3]  # expert choice: each expert its two most probable tokens


def test_plan_capacity_counts_each_sequence_by_itself():
    plan = plan_of(ALL_TO_ZERO, shape=(2, 2, 2), capacity=Capacity(1.0, 1, "position_token_major"))
    assert plan.slot_N.tolist() == [0, 2]


def test_plan_padding_neither_fills_nor_raises_capacity():
    capacity = Capacity(1.0, 1, "probability")
    probabilities = [[0.9], [0.5], [0.6], [0.8]]
    plan = plan_of(ALL_TO_ZERO, probabilities, counted=[[False, True, True, False]], shape=(1, 4, 2), capacity=capacity)
    assert plan.slot_N.tolist() == [2]  # two counted tokens: one row, for the more probable of them


def test_plan_minimum_capacity_holds_for_tiny_sequences():
    plan = plan_of([[0], [0]], shape=(1, 2, 8), capacity=Capacity(0.5, 2, "position_token_major"))
    assert plan.served_E.tolist() == [2] + [0] * 7


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.25, 1.5, 2.0])
def test_capacity_rows_are_the_ceiling_of_the_exact_product(factor):
    tokens = torch.arange(0, 200)
    rows = Capacity(factor, 1, "probability").rows(tokens, 2, 8)
    hundredths = round(factor * 100)
    assert rows.tolist() == [max(1, math.ceil(hundredths * t * 2 / 800 - 1e-12)) for t in tokens.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    length=st.integers(1, 9),
    experts=st.integers(2, 5),
    factor=st.sampled_from([None, 0.5, 1.0, 1.7]),
    policy=st.sampled_from(POLICIES),
    asks=st.booleans(),
    by_rank=st.booleans(),
    pad=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_plan_any_routing_keeps_its_invariants(batch, length, experts, factor, policy, asks, by_rank, pad, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch * length, experts, generator=generator)
    chosen = scores.topk(2).indices
    counted = torch.rand(batch, length, generator=generator) > 0.3
    capacity = None if factor is None else Capacity(factor, 1, policy, by_rank=by_rank, pad=pad)
    asks_TK = torch.rand(chosen.shape, generator=generator) > 0.3 if asks else torch.ones_like(chosen, dtype=torch.bool)
    shape = (batch, length, experts)
    plan = make_plan(chosen, scores.gather(1, chosen), counted, shape, capacity, asks_TK if asks else None)
    wanted_TK = asks_TK & counted.reshape(-1, 1)
    full_N = torch.nonzero(plan.slot_N >= 0).flatten()
    slot_N = plan.slot_N[full_N]
    expert_of_row = chosen.reshape(-1)[slot_N]
    assert torch.equal(expert_of_row, expert_of_row.sort().values)
    assert torch.equal(torch.bincount(expert_of_row, minlength=experts), plan.served_E)
    assert torch.equal(plan.demand_E, torch.bincount(chosen[wanted_TK], minlength=experts))
    assert int(plan.kept_TK.sum()) == slot_N.numel()
    assert torch.equal(plan.row_TK.reshape(-1)[slot_N], full_N)
    owner_N = torch.arange(experts).repeat_interleave(plan.rows_E)
    assert torch.equal(owner_N[full_N], expert_of_row), "a row lies in the part of its expert"
    values = torch.arange(1.0, chosen.numel() + 1).view_as(chosen)
    assert torch.equal(plan.to_slots(plan.of_rows(values)), values * plan.kept_TK), "there and back"
    if capacity is not None and pad:
        whole = torch.full((batch,), length) if not by_rank else torch.tensor([batch * length])
        assert plan.rows_each == (int(capacity.rows(whole, 2, experts).sum()) if batch else 0)
    else:
        assert plan.slot_N.numel() == slot_N.numel()
    assert not bool((plan.kept_TK & ~wanted_TK).any())
    if capacity is None:
        assert torch.equal(plan.kept_TK, wanted_TK)
    if capacity is not None:
        groups = [list(range(batch))] if by_rank else [[b] for b in range(batch)]
        for group in groups:
            limit = int(capacity.rows(counted[group].sum()[None], 2, experts))
            part, wanted = chosen.view(batch, length, 2)[group], wanted_TK.view(batch, length, 2)[group]
            taken = torch.bincount(part[plan.kept_TK.view(batch, length, 2)[group]], minlength=experts)
            assert int(taken.max()) <= limit
            asked = torch.bincount(part[wanted], minlength=experts)
            assert torch.equal(taken, asked.clamp(max=limit)), "an expert with room drops nobody"


def test_plan_counts_a_million_assignments_exactly():
    tokens = 1_000_003
    expert_TK = torch.zeros(tokens, 1, dtype=torch.int64)
    expert_TK[::3] = 2
    made = plan_of(expert_TK, shape=(1, tokens, 3))
    assert made.demand_E.dtype == made.served_E.dtype == torch.int64
    assert made.demand_E.tolist() == made.served_E.tolist() == [666_668, 0, 333_335]
