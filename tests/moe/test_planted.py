"""Mistakes that peers have shipped, planted one by one: the test named beside each must catch it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import rules
from moe_dist.moe import layer, plan, randomness, router, router_kinds, selection
from moe_dist.moe.decision import RoutingDecision
from tests.config import test_rules
from tests.moe import test_layer, test_plan, test_routers, test_selection
from tests.support.planted import failure_with

pytestmark = pytest.mark.usefixtures("one_thread")


def no_rule_for_gates(moe: Any) -> Any:
    return iter(())


def masked_with_zero(choice_TE: Tensor, num_groups: int, groups_per_token: int, *_: Any) -> Tensor:
    return original_limit(choice_TE, num_groups, groups_per_token).nan_to_num(neginf=0.0)


def scored_by_best(choice_TE: Tensor, num_groups: int, groups_per_token: int, *_: Any) -> Tensor:
    best_TJ = choice_TE.unflatten(-1, (num_groups, -1)).amax(-1)
    size = choice_TE.shape[1] // num_groups
    shut_TJ = torch.ones_like(best_TJ).scatter(1, best_TJ.topk(groups_per_token).indices, 0.0).bool()
    return choice_TE.masked_fill(shut_TJ.repeat_interleave(size, 1), float("-inf"))


def demand_after_drops(*arguments: Any) -> plan.RoutingPlan:
    made = original_plan(*arguments)
    return dataclasses.replace(made, demand_E=made.served_E)


def balance_of_kept(self: Any, chosen: Any, whole: plan.RoutingPlan, *others: Any) -> Any:
    return original_balance_demand(self, (chosen[0], whole.kept_TK), whole, *others)


def bias_of_fp32_counts(bias_E: Tensor, demand_E: Tensor, rate: float) -> Tensor:
    return bias_E + rate * torch.sign(demand_E.float().mean() - demand_E.float())


def sigmoid_with_epsilon(logits_TE: Tensor, config: Any, bias_E: Tensor | None = None, *_: Any) -> RoutingDecision:
    decision = original_sigmoid(logits_TE, config, bias_E)
    score_TE = logits_TE.sigmoid()
    share_TE = score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)
    chosen_TK = score_TE.gather(1, decision.expert_TK)
    gate_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-9)
    return dataclasses.replace(decision, probability_TE=share_TE, gate_TK=gate_TK)


def gates_with_bias(logits_TE: Tensor, config: Any, bias_E: Tensor | None = None, *_: Any) -> RoutingDecision:
    decision = original_sigmoid(logits_TE, config, bias_E)
    if bias_E is None:
        return decision
    biased_TE = F.logsigmoid(logits_TE) + bias_E
    return dataclasses.replace(decision, gate_TK=biased_TE.gather(1, decision.expert_TK).softmax(-1))


def positions_of_this_rank(self: Any, batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch * length, device=device)


def always_token_major(self: Any, probability_TK: Tensor) -> Tensor | None:
    return probability_TK.reshape(-1) if self.policy == "probability" else None


def second_never_left_out(logits_TE: Tensor, config: Any, uniform_T: Tensor | None, *_: Any) -> RoutingDecision:
    return original_gshard(logits_TE, config, None)


original_limit, original_plan = selection.limit_to_groups, layer.make_plan
original_balance_demand = layer.MoELayer._balance_demand
original_sigmoid, original_gshard = router_kinds.sigmoid_topk, router_kinds.gshard_top2
TOP_1 = next(case for case in test_rules.BROKEN if "always 1" in case[1][2])
CROSSED = ("position_choice_major", [[True, True], [True, False], [True, False]])

# trap: (where, name, the mistake, the test that must fail)
PLANTED: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "7 top-1 normalised gate allowed": (
        *(rules, "_router_rules", no_rule_for_gates),
        lambda: test_rules.test_rule_broken_names_key_value_rule_and_fix(*TOP_1),
    ),
    "8 closed groups masked with 0": (
        *(selection, "limit_to_groups", masked_with_zero),
        test_selection.test_groups_closed_one_never_wins_even_with_negative_biases,
    ),
    "8 groups scored by their best expert": (
        *(selection, "limit_to_groups", scored_by_best),
        test_selection.test_groups_closed_one_never_wins_even_with_negative_biases,
    ),
    "9 choice-major drops made token-major": (
        *(plan.Capacity, "priority", always_token_major),
        lambda: test_plan.test_plan_crossed_choices_drop_as_worked_by_hand(*CROSSED),
    ),
    "11 demand counted after drops": (
        *(layer, "make_plan", demand_after_drops),
        test_layer.test_layer_drops_do_not_reach_demand_or_balance,
    ),
    "11 balance fed with kept choices": (
        *(layer.MoELayer, "_balance_demand", balance_of_kept),
        test_layer.test_layer_drops_do_not_reach_demand_or_balance,
    ),
    "12 bias cast with its module": (
        *(router.Router, "_apply", nn.Module._apply),
        lambda: test_selection.test_bias_stays_fp32_and_keeps_its_bits_when_the_module_is_cast(torch.bfloat16),
    ),
    "12 load compared in fp32": (
        *(test_selection, "moved_bias", bias_of_fp32_counts),
        test_selection.test_bias_moves_against_the_load_by_whole_numbers,
    ),
    "16 random numbers by place in the rank": (
        *(randomness.Draw, "positions_T", positions_of_this_rank),
        lambda: test_routers.test_router_that_draws_does_not_depend_on_how_the_batch_is_cut("gshard"),
    ),
    "17 probabilities normalised with an epsilon": (
        *(router_kinds, "sigmoid_topk", sigmoid_with_epsilon),
        lambda: test_routers.test_balance_does_not_fall_below_one_when_all_logits_shift(router_kinds.sigmoid_topk, -80),
    ),
    "17 gates normalised with an epsilon": (
        *(router_kinds, "sigmoid_topk", sigmoid_with_epsilon),
        lambda: test_routers.test_normalised_gates_sum_to_one_however_low_the_scores(router_kinds.sigmoid_topk, -60),
    ),
    "selection bias reaches the gates": (
        *(router_kinds, "sigmoid_topk", gates_with_bias),
        lambda: test_selection.test_bias_changes_the_choice_but_no_gate_and_no_probability(router_kinds.sigmoid_topk),
    ),
    "second expert of GShard always asked": (
        *(router_kinds, "gshard_top2", second_never_left_out),
        lambda: test_routers.test_router_any_capacity_equals_the_oracle("gshard", {}, True, False),
    ),
}


@pytest.mark.parametrize("trap", PLANTED)
def test_planted_mistake_is_caught(trap):
    assert failure_with(PLANTED[trap]) is not None
