"""Balance terms as pure functions: against the published formulas written out, and against counts worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_dist.config import MoEConfig
from moe_dist.moe import balance
from moe_dist.moe.decision import RoutingContext
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.router_kinds import sigmoid_topk, softmax_topk
from tests.support.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

B, S, E, K, GROUPS = 3, 10, 12, 3, 4


def decided(kind=softmax_topk):
    logits = torch.randn(B * S, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return kind(logits, MoEConfig(num_experts=E, top_k=K))


def sums_of(decision) -> tuple[Tensor, Tensor]:
    """Probabilities and demand by sequence, [B, E]."""
    probability_BE = balance.probability_by_sequence(decision.probability_TE, None, S)
    return probability_BE, balance.demand_by_sequence(decision.expert_TK, None, S, E)


def device_level_loss(decision) -> Tensor:
    """DeepSeek-V2, equations 24 to 28 without the coefficient, over all tokens, one symbol after the other."""
    s, chosen = decision.probability_TE, decision.expert_TK
    tokens, devices = len(s), [range(d * E // GROUPS, (d + 1) * E // GROUPS) for d in range(GROUPS)]
    f = [E / (K * tokens) * sum(float((chosen[t] == i).any()) for t in range(tokens)) for i in range(E)]
    p = [sum(s[t, i] for t in range(tokens)) / tokens for i in range(E)]
    return sum((sum(f[j] for j in device) / len(device)) * sum(p[j] for j in device) for device in devices)


def test_group_balance_equals_the_device_level_loss_of_deepseek_v2():
    decision = decided()
    probability_BE, demand_BE = sums_of(decision)
    in_groups = (balance.sum_in_groups(value, GROUPS) for value in (probability_BE, demand_BE.sum(0, keepdim=True)))
    assert_close(balance.balance_sum(*in_groups) / (B * S), device_level_loss(decision), "group balance")


def test_group_balance_is_one_where_groups_are_even_though_experts_are_not():
    demand_XE = torch.tensor([[6, 0, 3, 3]])
    probability_XE = torch.tensor([[5.0, 1.0, 2.0, 4.0]])
    in_groups = (balance.sum_in_groups(value, 2) for value in (probability_XE, demand_XE))
    assert float(balance.balance_sum(*in_groups)) == 12
    assert float(balance.balance_sum(probability_XE, demand_XE)) == pytest.approx(4 * (30 + 18) / 12)


def test_sequence_balance_equals_the_published_formula_of_deepseek_v3():
    """Equations 17 to 20 without the coefficient: s' is the affinity over the sum of a token's affinities."""
    decision = decided(sigmoid_topk)
    affinity = decision.logits_TE.sigmoid()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        tokens = range(b * S, (b + 1) * S)
        for i in range(E):
            f = E / (K * S) * sum(float((decision.expert_TK[t] == i).any()) for t in tokens)
            total = total + f * sum(affinity[t, i] / affinity[t].sum() for t in tokens) / S
    assert_close(balance.balance_sum(*sums_of(decision)) / S, total, "sequence balance")


def test_z_sum_equals_the_published_formula_of_st_moe():
    decision = decided()
    counted = torch.arange(B * S) % 4 > 0
    wanted = sum(
        torch.log(torch.exp(x).sum()) ** 2 for x, here in zip(decision.logits_TE, counted, strict=True) if here
    )
    assert_close(balance.z_sum(decision.logits_TE, counted.view(B, S)), wanted, "z")


def test_entropy_is_that_of_counted_tokens_and_zero_where_the_router_is_sure():
    probability_TE = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    counted_BS = torch.tensor([[True, True, False]])
    assert float(balance.entropy_sum(probability_TE, counted_BS)) == pytest.approx(math.log(2))
    assert float(balance.entropy_sum(probability_TE, None)) == pytest.approx(math.log(2) + math.log(3))


@pytest.mark.parametrize(("load", "violation"), [([4, 4], 0.0), ([8, 0], 1.0), ([0, 0], 0.0), ([3, 3, 6], 0.5)])
def test_max_violation_as_worked_by_hand(load, violation):
    assert balance.max_violation(torch.tensor(load)) == violation


def layer_that_asks(global_balance: str) -> tuple[MoELayer, list[Tensor]]:
    """A layer, and what it asked the ranks to sum; they answer with ten times as much."""
    moe = MoEConfig(num_experts=4, shared_expert_width=0, balance_scope="global", global_balance=global_balance)
    layer, asked = MoELayer(8, moe, None, number=3), []

    def sum_over_ranks(counts: Tensor) -> Tensor:
        asked.append(counts)
        return 10 * counts

    layer.sum_over_ranks = sum_over_ranks
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return layer, asked


@pytest.mark.parametrize(
    ("global_balance", "asks", "times"), [("exact", 0, 0), ("micro_step", 1, 10), ("running", 1, 10)]
)
@pytest.mark.parametrize("known", [False, True])
def test_layer_takes_the_demand_it_is_told_and_asks_for_the_rest(global_balance, asks, times, known):
    layer, asked = layer_that_asks(global_balance)
    told_E = torch.tensor([5, 0, 0, 7])
    given = {3: told_E} if known and global_balance != "micro_step" else None
    context = RoutingContext(torch.zeros(2, 6, dtype=torch.int64), None, given)
    record = layer(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2)), None, context)[1]
    expected_E = (times if given or asks else 10) * record.plan.demand_E + (told_E if given else 0)
    assert len(asked) == (asks if given else 1)
    assert record.balance_demand_XE.tolist() == [expected_E.tolist()]
    wanted = 4 * (expected_E / expected_E.sum() * record.decision.probability_TE.sum(0)).sum()
    assert_close(record.balance_sum, wanted, "balance")
