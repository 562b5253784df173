"""Group limit and selection bias: what wins, what never reaches a gate, and what stays fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.config import MoEConfig
from moe_dist.moe.router import Router
from moe_dist.moe.router_kinds import sigmoid_topk, softmax_topk
from moe_dist.moe.selection import choose_experts, limit_to_groups, moved_bias
from tests.support.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def test_groups_best_two_decide_and_the_others_are_closed():
    # Groups of three: sums of the best two are 0.9 + 0.1, 0.6 + 0.5, 0.4 + 0.4.
    choice = torch.tensor([[0.9, 0.1, 0.0, 0.6, 0.5, 0.0, 0.4, 0.4, 0.4]])
    minus = float("-inf")
    assert limit_to_groups(choice, 3, 1).tolist() == [
        [minus] * 3 + choice[0, 3:6].tolist() + [minus] * 3,
    ]
    assert limit_to_groups(choice, 3, 2).tolist() == [choice[0, :6].tolist() + [minus] * 3]


def test_groups_of_one_expert_are_scored_by_it():
    choice = torch.tensor([[0.2, 0.5, 0.1, 0.4]])
    assert torch.isfinite(limit_to_groups(choice, 4, 2))[0].tolist() == [False, True, False, True]


def test_groups_with_equal_scores_open_from_the_lowest():
    assert torch.isfinite(limit_to_groups(torch.zeros(1, 8), 4, 2))[0].tolist() == [True] * 4 + [False] * 4


@settings(max_examples=80, deadline=None)
@given(
    groups=st.sampled_from([2, 3, 4]),
    size=st.integers(1, 4),
    opened=st.integers(1, 4),
    offset=st.floats(-5, 0.5),
    seed=st.integers(0, 10_000),
)
def test_groups_closed_one_never_wins_even_with_negative_biases(groups, size, opened, offset, seed):
    """Trap 8: masking with 0 lets a closed expert win where all open scores are negative."""
    opened = min(opened, groups)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.rand(groups * size, generator=generator) - 1 + offset
    top_k = opened * size
    config = MoEConfig(num_experts=groups * size, num_groups=groups, groups_per_token=opened, top_k=top_k)
    logits = torch.randn(6, groups * size, generator=generator, dtype=torch.float64)
    chosen = choose_experts(logits, logits.sigmoid(), bias, config)
    for score, experts in zip((logits.sigmoid() + bias).tolist(), chosen.tolist(), strict=True):
        by_group = [sorted(score[g * size : (g + 1) * size], reverse=True) for g in range(groups)]
        best = sorted(range(groups), key=lambda g: -sum(by_group[g][:2]))[:opened]
        assert {e // size for e in experts} == set(best)
        assert experts == sorted(experts, key=lambda e: -score[e])


@pytest.mark.parametrize("kind", [softmax_topk, sigmoid_topk])
def test_bias_changes_the_choice_but_no_gate_and_no_probability(kind):
    config = MoEConfig(num_experts=6, selection_bias=True)
    logits = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = torch.tensor([0.0, -9.0, 0.0, 9.0, 0.0, 0.0])
    plain, biased = kind(logits, config), kind(logits, config, bias)
    assert bool((biased.expert_TK == 3).any(1).all()) and not bool((biased.expert_TK == 1).any())
    assert not torch.equal(plain.expert_TK, biased.expert_TK)
    assert torch.equal(plain.probability_TE, biased.probability_TE)
    score = logits.softmax(-1) if kind is softmax_topk else logits.sigmoid()
    wanted = score.gather(1, biased.expert_TK)
    assert_close(biased.gate_TK, wanted / wanted.sum(-1, keepdim=True), "gates")


def test_bias_zero_chooses_as_without_one():
    config = MoEConfig(num_experts=6, top_k=3)
    logits = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(softmax_topk(logits, config, torch.zeros(6)).expert_TK, softmax_topk(logits, config).expert_TK)


def test_bias_moves_against_the_load_by_whole_numbers():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    moved = moved_bias(bias, torch.tensor([10, 2, 6, 6]), 0.25)
    assert moved.tolist() == [0.25, 0.75, 0.5, 0.5]
    # Counts that bf16 or fp32 could not tell apart (trap 12): means of numbers above 2^24 that differ by one.
    huge = torch.tensor([2**30 + 1, 2**30, 2**30, 2**30 - 1])
    assert moved_bias(bias, huge, 0.25).tolist() == [0.25, 0.5, 0.5, 0.75]
    assert moved_bias(bias, torch.zeros(4, dtype=torch.int64), 0.25).tolist() == bias.tolist()


def test_bias_balances_a_skewed_router():
    logits = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 2, 8)
    config, bias = MoEConfig(num_experts=8), torch.zeros(8)
    loads = []
    for _ in range(300):
        chosen = sigmoid_topk(logits, config, bias).expert_TK
        loads.append(torch.bincount(chosen.flatten(), minlength=8))
        bias = moved_bias(bias, loads[-1], 0.01)
    assert int(loads[0].max()) > 2 * 100
    assert int(loads[-1].max()) < 1.1 * 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_stays_fp32_and_keeps_its_bits_when_the_module_is_cast(dtype):
    router = Router(16, MoEConfig(num_experts=4, selection_bias=True))
    exact = torch.tensor([0.001, 1.001, -0.3, 1e-7])
    router.selection_bias.copy_(exact)
    router.to(dtype)
    assert router.weight.dtype == dtype
    assert router.selection_bias.dtype == torch.float32 and torch.equal(router.selection_bias, exact)
    assert torch.equal(router.state_dict()["selection_bias"], exact)
    again = copy.deepcopy(router).half()
    assert torch.equal(again.selection_bias, exact)


def test_bias_moves_from_meta_with_its_module():
    with torch.device("meta"):
        router = Router(16, MoEConfig(num_experts=4, selection_bias=True))
    assert router.selection_bias.is_meta
    router.to(torch.bfloat16).to_empty(device="cpu")
    assert router.selection_bias.device.type == "cpu" and router.selection_bias.dtype == torch.float32
    assert Router(16, MoEConfig(num_experts=4)).selection_bias is None


def test_groups_scored_by_their_best_expert_or_by_two() -> None:
    """DeepSeek-V2 takes the best, DeepSeek-V3 the sum of two: of (5, 0), (3, 3), (4, 0) one group stays."""
    choice = torch.tensor([[5.0, 0.0, 3.0, 3.0, 4.0, 0.0]])
    by_one, by_two = (torch.isfinite(limit_to_groups(choice, 3, 1, scored_by))[0].tolist() for scored_by in (1, 2))
    assert by_one == [True, True, False, False, False, False]
    assert by_two == [False, False, True, True, False, False]
