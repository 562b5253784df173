"""The mixture-of-experts layer: route -> plan -> dispatch -> experts -> combine, plus the shared expert.

Shape letters: B sequences, S tokens of a sequence, T = B*S tokens, D model width, E experts, K experts per token.

    out(x) = sum over the chosen experts e of gate_e(x) * expert_e(x)  +  shared(x)

With `latent_width` the sum is `latent_out(sum of gate_e(x) * expert_e(latent_in(x)))`: narrower rows travel (LatentMoE,
Elango et al. 2026). With `shared_expert_gate` the last term is `sigmoid(w x) * shared(x)` (Qwen2-MoE).
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
        group_balance_sum: The same over groups of experts, differentiable scalar.
        z_sum: z-loss term, differentiable scalar.
        balance_demand_XE: The demand that the balance terms took: by sequence, or [1, E] of all they are about.
        probability_E: Router probabilities summed over counted tokens; no gradient.
        entropy_sum: Router entropy summed over counted tokens, nats; no gradient.
    """

    decision: RoutingDecision
    plan: RoutingPlan
    journey: Journey
    balance_sum: Tensor
    group_balance_sum: Tensor
    z_sum: Tensor
    balance_demand_XE: Tensor
    probability_E: Tensor
    entropy_sum: Tensor


class MoELayer(nn.Module):
    """A feed-forward of routed experts with an optional shared expert.

    `dispatcher` and `sum_over_ranks` are the two places where `parallel` reaches in: the one brings rows to experts
    elsewhere, the other adds integer counts over the processes of a step. On one device they do nothing special.
    """

    def __init__(self, width: int, config: MoEConfig, shared: nn.Module | None, number: int = 0) -> None:
        super().__init__()
        self.config = config
        self.number = number
        self.router = build_router(width, config, number)
        self.experts = Experts(width, config)
        self.shared = shared
        gated, latent = shared is not None and config.shared_expert_gate, config.latent_width
        self.shared_gate = nn.Linear(width, 1, bias=False) if gated else None
        self.latent_in = nn.Linear(width, latent, bias=False) if latent else None
        self.latent_out = nn.Linear(latent, width, bias=False) if latent else None
        self.dispatcher: Dispatcher = LocalDispatcher(config.weigh == "input")
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
        follow = None if context is None else context.followed(self.number)
        plan = self._plan(decision, (batch, length), counted_BS, follow)
        out_TD, journey = self._through_experts(x_TD, self._weights(decision, plan), plan)
        if self.shared is not None:
            out_TD = out_TD + self._shared(x_TD)
        record = self._record(decision, plan, journey, counted_BS, length, context)
        return out_TD.view(batch, length, width), record

    def _through_experts(self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan) -> tuple[Tensor, Journey]:
        """The routed experts, in the latent space where the config has one: tokens are projected before they travel."""
        z_TD = x_TD if self.latent_in is None else self.latent_in(x_TD)
        here = isinstance(self.dispatcher, LocalDispatcher) and self.config.weigh == "output"
        if here and self.experts.takes_tokens(z_TD):
            out_TD, journey = self.experts.of_tokens(z_TD, gate_TK, plan), Journey(plan.slot_N.numel())
        else:
            out_TD, journey = self.dispatcher.run(z_TD, gate_TK, plan, self.experts)
        return (out_TD if self.latent_out is None else self.latent_out(out_TD)), journey

    def _shared(self, x_TD: Tensor) -> Tensor:
        assert self.shared is not None, "asked only where there is a shared expert"
        out_TD = self.shared(x_TD)
        return out_TD if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_TD)) * out_TD

    def _plan(
        self, decision: RoutingDecision, shape: tuple[int, int], counted_BS: Tensor | None, follow: Choices | None
    ) -> RoutingPlan:
        """The rows of a decision; where choices are followed, those that were kept before are kept again."""
        expert_TK, asks_TK = decision.expert_TK, decision.asks_TK
        capacity, shape_BSE = Capacity.of(self.config, self.training), (*shape, self.config.num_experts)
        if follow is not None:
            return follow_plan(expert_TK, follow.kept_TK, counted_BS, shape_BSE, capacity, asks_TK)
        probability_TK = decision.probability_TE.detach().gather(1, expert_TK)
        return make_plan(expert_TK, probability_TK, counted_BS, shape_BSE, capacity, asks_TK)

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
        context: RoutingContext | None = None,
    ) -> MoERecord:
        groups = self.config.num_groups
        probability_BE = balance.probability_by_sequence(decision.probability_TE, counted_BS, length)
        match self.config.balance_scope:
            case "sequence":
                experts = self.config.num_experts
                demand_XE = balance.demand_by_sequence(
                    decision.expert_TK, counted_BS, length, experts, decision.asks_TK
                )
            case "micro_batch":
                demand_XE = plan.demand_E[None]
            case "global":
                demand_XE = self._global_demand(plan.demand_E, context)[None]
        in_groups = (balance.sum_in_groups(value, groups) for value in (probability_BE, demand_XE))
        return MoERecord(
            decision,
            plan,
            journey,
            balance_sum=balance.balance_sum(probability_BE, demand_XE),
            group_balance_sum=balance.balance_sum(*in_groups),
            z_sum=balance.z_sum(decision.logits_TE, counted_BS),
            balance_demand_XE=demand_XE,
            probability_E=probability_BE.detach().sum(0),
            entropy_sum=balance.entropy_sum(decision.probability_TE, counted_BS),
        )

    def _global_demand(self, demand_E: Tensor, context: RoutingContext | None) -> Tensor:
        """Demand that the global balance term takes, int64 [E]: known before, or asked of all ranks."""
        known = None if context is None or context.demand is None else context.demand[self.number]
        if known is None:
            return self.sum_over_ranks(demand_E)
        if self.config.global_balance == "running":
            return known + self.sum_over_ranks(demand_E)
        return known


def _only_here(counts: Tensor) -> Tensor:
    return counts
