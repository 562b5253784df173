"""The mixture-of-experts layer: route -> plan -> dispatch -> experts -> combine, plus the shared expert.

Shape letters: B sequences, S tokens of a sequence, T = B*S tokens, D model width, E experts, K experts per token.

    out(x) = sum over the chosen experts e of gate_e(x) * expert_e(x)  +  shared(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_dist.config import MoEConfig
from moe_dist.moe import balance
from moe_dist.moe.decision import RoutingContext, RoutingDecision
from moe_dist.moe.dispatch import Dispatcher, Journey, LocalDispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.ledger import Choices
from moe_dist.moe.plan import Capacity, RoutingPlan, follow_plan, make_plan
from moe_dist.moe.router import build_router


@dataclass(frozen=True)
class MoERecord:
    """What one forward of one layer decided, and its balance terms as sums over counted tokens.

    Attributes:
        decision: The router's choice.
        plan: The rows it became; the source of every count.
        journey: What bringing them to the experts cost.
        balance_sum: Load-balancing term, differentiable scalar.
        z_sum: z-loss term, differentiable scalar.
    """

    decision: RoutingDecision
    plan: RoutingPlan
    journey: Journey
    balance_sum: Tensor
    z_sum: Tensor


class MoELayer(nn.Module):
    """A feed-forward of routed experts with an optional shared expert.

    `dispatcher` and `sum_over_ranks` are the two places where `parallel` reaches in: the one brings rows to experts
    elsewhere, the other adds integer counts over the processes of a step. On one device they do nothing special.
    """

    def __init__(self, width: int, config: MoEConfig, shared: nn.Module | None, number: int = 0) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(width, config, number)
        self.experts = Experts(width, config)
        self.shared = shared
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.sum_over_ranks: Callable[[Tensor], Tensor] = _only_here

    def forward(
        self, x_BSD: Tensor, counted_BS: Tensor | None = None, context: RoutingContext | None = None
    ) -> tuple[Tensor, MoERecord]:
        """Routes, computes and combines.

        Args:
            x_BSD: Input.
            counted_BS: False for padding, which no routed expert sees; None where all count.
            context: Token ids and random numbers, for routers that use them, and choices to be followed.
        """
        batch, length, width = x_BSD.shape
        x_TD = x_BSD.reshape(-1, width)
        decision = self.router(x_TD, context)
        follow = None if context is None else context.followed(self.router.layer)
        plan = self._plan(decision, (batch, length), counted_BS, follow)
        out_TD, journey = self.dispatcher.run(x_TD, self._weights(decision, plan), plan, self.experts)
        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        return out_TD.view(batch, length, width), self._record(decision, plan, journey, counted_BS, length)

    def _plan(
        self, decision: RoutingDecision, shape: tuple[int, int], counted_BS: Tensor | None, follow: Choices | None
    ) -> RoutingPlan:
        """The rows of a decision; where choices are followed, those that were kept before are kept again."""
        expert_TK, asks_TK, experts = decision.expert_TK, decision.asks_TK, self.config.num_experts
        if follow is not None:
            return follow_plan(expert_TK, follow.kept_TK, counted_BS, experts, asks_TK)
        probability_TK = decision.probability_TE.detach().gather(1, expert_TK)
        capacity = Capacity.of(self.config, self.training)
        return make_plan(expert_TK, probability_TK, counted_BS, (*shape, experts), capacity, asks_TK)

    def _weights(self, decision: RoutingDecision, plan: RoutingPlan) -> Tensor:
        """Gate weights of kept choices; after drops those left may be scaled to the sum before."""
        if plan.keeps_all or not self.config.renormalize_after_drop:
            return decision.gate_TK
        kept_TK = decision.gate_TK * plan.kept_TK
        left_T1 = kept_TK.sum(-1, keepdim=True)
        whole_T1 = decision.gate_TK.sum(-1, keepdim=True)
        return kept_TK * (whole_T1 / torch.where(left_T1 > 0, left_T1, torch.ones_like(left_T1)))

    def _record(
        self,
        decision: RoutingDecision,
        plan: RoutingPlan,
        journey: Journey,
        counted_BS: Tensor | None,
        length: int,
    ) -> MoERecord:
        probability_TE = decision.probability_TE
        if self.config.balance_scope == "global":
            balance_sum = balance.global_balance_sum(probability_TE, self.sum_over_ranks(plan.demand_E), counted_BS)
        else:
            demand_BE = balance.demand_by_sequence(
                decision.expert_TK, counted_BS, length, self.config.num_experts, decision.asks_TK
            )
            balance_sum = balance.sequence_balance_sum(probability_TE, demand_BE, counted_BS, length)
        return MoERecord(decision, plan, journey, balance_sum, balance.z_sum(decision.logits_TE, counted_BS))


def _only_here(counts: Tensor) -> Tensor:
    return counts
