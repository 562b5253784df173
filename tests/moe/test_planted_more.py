"""More planted mistakes: in the layer, the experts, the first weights, the step, its figures and the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dist.config.schema import OptimizerConfig
from moe_dist.model import init
from moe_dist.moe import balance, expert_loop, experts, layer, plan, router, router_kinds
from moe_dist.moe.decision import RoutingDecision
from moe_dist.objectives.language_modelling import LossSums
from moe_dist.train import step
from tests.model import test_transformer
from tests.moe import test_experts, test_layer, test_plan
from tests.parallel import test_expert_parallel
from tests.support.planted import failure_with, idle_experts_unfilled, named_by_place
from tests.train import test_step_terms

pytestmark = pytest.mark.usefixtures("one_thread")


def counted_of(sums: LossSums) -> int:
    return len(sums.records[0].decision.expert_TK)


def balance_as_mean(self: LossSums, config: Any) -> Tensor:
    """The mean of a micro-batch in place of its sum: the more parts a batch is cut into, the larger."""
    mean = self.balance * 72 / max(1, counted_of(self))
    return original_total(dataclasses.replace(self, balance=mean), config)


def balance_times_batch(self: LossSums, config: Any) -> Tensor:
    return original_total(dataclasses.replace(self, balance=self.balance * counted_of(self) / 72), config)


def demand_of_this_part(self: Any, demand_E: Tensor, context: Any) -> Tensor:
    return demand_E


def demand_of_the_parts_so_far(self: Any, demand_E: Tensor, context: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return original_demand(self, demand_E, context)
    self.seen = getattr(self, "seen", 0) + demand_E
    return self.seen


def router_of_half_the_width(self: Any, x_TD: Tensor, context: Any = None) -> RoutingDecision:
    half = torch.arange(x_TD.shape[1], device=x_TD.device) < x_TD.shape[1] // 2
    return original_router(self, x_TD * half, context)


def router_of_every_other_token(self: Any, x_TD: Tensor, context: Any = None) -> RoutingDecision:
    return original_router(self, x_TD[::2].repeat_interleave(2, 0)[: len(x_TD)], context)


def without_gradient(value: Tensor) -> Tensor:
    return value.detach() + 0 * value  # zero and not missing, which autograd itself would refuse


def gates_without_gradient(*given: Any) -> RoutingDecision:
    made = original_softmax(*given)
    return dataclasses.replace(made, gate_TK=without_gradient(made.gate_TK))


def probabilities_without_gradient(*given: Any) -> RoutingDecision:
    made = original_softmax(*given)
    return dataclasses.replace(made, probability_TE=without_gradient(made.probability_TE))


def padding_takes_capacity(expert_TK: Tensor, probability_TK: Tensor, counted_BS: Any, *others: Any) -> Any:
    return original_plan(expert_TK, probability_TK, None, *others)


def padding_in_probabilities(probability_TE: Tensor, counted_BS: Any, length: int) -> Tensor:
    return original_probability(probability_TE, None, length)


def padding_in_demand(expert_TK: Tensor, counted_BS: Any, *others: Any) -> Tensor:
    return original_by_sequence(expert_TK, None, *others)


def padding_in_z(logits_TE: Tensor, counted_BS: Any) -> Tensor:
    return original_z(logits_TE, None)


def counted_in(dtype: torch.dtype) -> Any:
    def narrow_plan(*given: Any) -> plan.RoutingPlan:
        made = original_plan(*given)
        return dataclasses.replace(made, demand_E=made.demand_E.to(dtype).long())

    return narrow_plan


def tally_in(dtype: torch.dtype) -> Any:
    def narrow_tally(self: Any, *given: Any) -> None:
        original_tally(self, *given)
        self.sums = {name: value.to(dtype) for name, value in self.sums.items()}

    return narrow_tally


def nothing_to_do_without_rows(self: Any, x_TD: Tensor, *others: Any) -> Tensor:
    return original_of_tokens(self, x_TD, *others) if len(x_TD) else x_TD * 0


def without_expert_id(name: str, *others: Any) -> Tensor:
    return original_value(name.partition("#")[0], *others)


def load_of_this_rank(self: Any) -> dict[str, Tensor]:
    return original_over_ranks(self) | {name: self.sums[name].cpu() for name in ("demand", "served")}


class NormalisedAdamW(torch.optim.AdamW):
    """Looks at the norm of a whole parameter, as matrix-wise optimizers do: with a stack, that of all experts."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(parameter.grad.norm() + 1e-12)
        return super().step(closure)


class LazyAdamW(torch.optim.AdamW):
    """Leaves an expert alone that has no tokens in this step, in a stack as it would alone."""

    def step(self, closure: Any = None) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [parameter.detach().clone() for parameter in parameters]
        super().step(closure)
        for parameter, old in zip(parameters, before, strict=True):
            idle = (parameter.grad == 0).flatten(-2).all(-1)
            parameter.data[idle] = old[idle]


def built_as(kind: type[torch.optim.AdamW]) -> Any:
    def build(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        told = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        return kind(model.parameters(), weight_decay=config.weight_decay, **told)

    return build


def only_matrices_decayed(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    optimizer = original_adamw(model, config)
    for group in optimizer.param_groups:
        if any(parameter.ndim != 2 for parameter in group["params"]):
            group["weight_decay"] = 0.0
    return optimizer


def as_it_came(y_RD: Tensor) -> Tensor:
    return y_RD


def ends_short_of_the_rows(backend: str, counts_L: list[int], device: torch.device) -> Any:
    """A grouped product that ends one row early; the row that is left holds what the memory held."""
    right, rows = original_product(backend, counts_L, device), sum(counts_L)

    def product(rows_RD: Tensor, weight: Tensor) -> Tensor:
        left_over = torch.arange(rows, device=device)[:, None] == rows - 1
        return right(rows_RD, weight).masked_fill(left_over, torch.nan)

    return product


def left_over_rows_accepted(self: Any, rows_RD: Tensor, counts_L: list[int]) -> Tensor:
    used = original_experts(self, rows_RD[: sum(counts_L)], counts_L)
    return torch.cat([used, torch.full_like(rows_RD[sum(counts_L) :], torch.nan)])


def refusal_of_left_over_rows() -> None:
    """`pytest.raises` tells of what was not raised by an exception of its own."""
    try:
        test_experts.test_experts_refuse_rows_that_belong_to_no_expert("grouped")
    except pytest.fail.Exception as failure:
        raise AssertionError(str(failure)) from failure


def unsorted(counts_WL: Tensor) -> Tensor:
    return torch.arange(int(counts_WL.sum()))


original_total, original_demand = LossSums.total, layer.MoELayer._global_demand
original_router, original_softmax = router.Router.forward, router_kinds.softmax_topk
original_plan, original_tally = layer.make_plan, step._Tally.__init__
original_probability, original_z = balance.probability_by_sequence, balance.z_sum
original_by_sequence = balance.demand_by_sequence
original_backward, original_of_tokens = expert_loop._ExpertLoop.backward, experts.Experts.of_tokens
original_value = init.initial_value
original_over_ranks, original_adamw = step._Tally._over_all_ranks, test_step_terms.build_adamw
original_product, original_experts = experts._product, experts.Experts.forward
PLAIN = ((None, "probability"), False, False, "sequence", True)
GROUPED = ("grouped", torch.float32, [3, 0, 5, 1])


def against_the_oracle() -> None:
    test_layer.test_layer_any_options_equal_the_oracle(*PLAIN)


def grouped_experts() -> None:
    """What torch says of an expanded gradient counts as a failed proof; any other error goes through."""
    try:
        test_experts.test_experts_any_counts_equal_one_product_an_expert(*GROUPED)
    except RuntimeError as error:
        assert "Invalid strides" not in str(error), str(error)
        raise


TEN = test_layer.test_layer_added_padding_changes_nothing
SIX = test_layer.test_layer_router_gets_gradient_from_either_loss_alone
TWENTY_TWO = test_step_terms.test_stacked_experts_are_updated_as_so_many_single_ones
THREE = test_step_terms.test_global_balance_of_skewed_micro_batches_is_that_of_one_giant_batch

# trap: (where, name, the mistake, the test that must fail)
PLANTED: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "2 balance term is the mean of a micro-batch": (
        *(LossSums, "total", balance_as_mean),
        test_step_terms.test_balance_gradient_is_the_same_however_the_batch_is_cut,
    ),
    "2 balance term times the micro-batch size": (
        *(LossSums, "total", balance_times_batch),
        test_step_terms.test_balance_gradient_is_the_same_however_the_batch_is_cut,
    ),
    "3 global balance of a micro-batch's own demand": (layer.MoELayer, "_global_demand", demand_of_this_part, THREE),
    "3 global balance of a running demand": (layer.MoELayer, "_global_demand", demand_of_the_parts_so_far, THREE),
    "5 router sees half of the width": (router.Router, "forward", router_of_half_the_width, against_the_oracle),
    "5 router sees half of the tokens": (router.Router, "forward", router_of_every_other_token, against_the_oracle),
    "6 gates without gradient": (router_kinds, "softmax_topk", gates_without_gradient, SIX),
    "6 balance term without gradient": (router_kinds, "softmax_topk", probabilities_without_gradient, SIX),
    "10 padding takes rows and capacity": (layer, "make_plan", padding_takes_capacity, TEN),
    "10 padding enters the balance term's probabilities": (
        *(balance, "probability_by_sequence", padding_in_probabilities),
        TEN,
    ),
    "10 padding enters the balance term's demand": (balance, "demand_by_sequence", padding_in_demand, TEN),
    "10 padding enters the z-loss": (balance, "z_sum", padding_in_z, TEN),
    "12 demand counted in bf16": (
        *(test_plan, "make_plan", counted_in(torch.bfloat16)),
        test_plan.test_plan_counts_a_million_assignments_exactly,
    ),
    "12 demand counted in bytes": (
        *(test_plan, "make_plan", counted_in(torch.uint8)),
        test_plan.test_plan_counts_a_million_assignments_exactly,
    ),
    "12 loads of a step added up in bf16": (
        *(step._Tally, "__init__", tally_in(torch.bfloat16)),
        test_step_terms.test_load_is_counted_exactly_beyond_what_a_narrow_type_holds,
    ),
    "12 loads of a step added up in fp32": (
        *(step._Tally, "__init__", tally_in(torch.float32)),
        test_step_terms.test_load_is_counted_exactly_beyond_what_a_narrow_type_holds,
    ),
    "14 gradient of idle experts left uninitialised": (
        *(expert_loop._ExpertLoop, "backward", staticmethod(idle_experts_unfilled(original_backward))),
        test_layer.test_layer_all_tokens_to_one_expert_gives_zero_gradient_to_the_others,
    ),
    "14 experts of an empty batch without gradient": (
        *(experts.Experts, "of_tokens", nothing_to_do_without_rows),
        test_layer.test_layer_without_sequences_has_zero_gradients_everywhere,
    ),
    "16 every expert starts from the same seed": (
        *(init, "initial_value", without_expert_id),
        test_transformer.test_initial_experts_are_all_different,
    ),
    "16 first weights by place in the stack": (
        *(init, "pieces_by_parameter", named_by_place),
        test_transformer.test_initial_experts_of_a_part_are_those_of_the_whole,
    ),
    "18 imbalance of this rank's load": (
        *(step._Tally, "_over_all_ranks", load_of_this_rank),
        test_step_terms.test_imbalance_is_of_the_load_of_all_ranks_together,
    ),
    "19 rows left in order of arrival": (
        *(test_expert_parallel, "arrange_by_expert", unsorted),
        test_expert_parallel.test_arrange_by_expert_matches_the_table_worked_by_hand,
    ),
    "22 gradient normalised over the whole stack": (
        *(test_step_terms, "build_adamw", built_as(NormalisedAdamW)),
        TWENTY_TWO,
    ),
    "22 experts without tokens left out of decay and momentum": (
        *(test_step_terms, "build_adamw", built_as(LazyAdamW)),
        TWENTY_TWO,
    ),
    "22 stacked experts are not decayed": (test_step_terms, "build_adamw", only_matrices_decayed, TWENTY_TWO),
    "25 grouped product shorter than its rows": (experts, "_product", ends_short_of_the_rows, grouped_experts),
    "25 rows of no expert accepted": (experts.Experts, "forward", left_over_rows_accepted, refusal_of_left_over_rows),
    "25 expanded gradient handed to the grouped product": (experts, "_contiguous", as_it_came, grouped_experts),
}


@pytest.mark.parametrize("trap", PLANTED)
def test_planted_mistake_is_caught(trap: str) -> None:
    assert failure_with(PLANTED[trap]) is not None
