"""The mixture-of-experts layer: route -> plan -> dispatch -> experts -> combine, plus the shared expert.

Shape letters: B sequences, S tokens of a sequence, T = B*S tokens, D model width, E experts, K experts per token.

    out(x) = sum over the chosen experts e of gate_e(x) * expert_e(x)  +  shared(x)

With `latent_width` the sum is `latent_out(sum of gate_e(x) * expert_e(latent_in(x)))`: narrower rows travel (LatentMoE,
Elango et al. 2026). With `shared_expert_gate` the last term is `sigmoid(w x) * shared(x)` (Qwen2-MoE).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import MoEConfig
from moe_dist.moe import balance
from moe_dist.moe.decision import RoutingContext, RoutingDecision
from moe_dist.moe.dispatch import Dispatcher, Journey, LocalDispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.ledger import Choices
from moe_dist.moe.plan import Capacity, RoutingPlan, demand_of, follow_plan, make_plan
from moe_dist.moe.product import Linear
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
        first: Place of the first token that was routed here in the micro-batch.
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
    first: int = 0


class TokenShare(Protocol):
    """Which tokens of a micro-batch this process routes."""

    def here(self, count: int) -> slice:
        """Which of `count` tokens are routed here."""
        ...

    def whole(self, held: Tensor) -> Tensor:
        """What is known of all tokens, from what is known of those here; no gradient."""
        ...


class AllTokens:
    """Every token is routed here."""

    def here(self, count: int) -> slice:
        return slice(0, count)

    def whole(self, held: Tensor) -> Tensor:
        return held


@dataclass(frozen=True)
class _Batch:
    """The tokens of a micro-batch: B, S, which are counted, and which are here."""

    shape: tuple[int, int]
    counted_BS: Tensor | None
    here: slice

    @property
    def counted_T(self) -> Tensor | None:
        """Whether each token here is counted."""
        return None if self.counted_BS is None else self.counted_BS.reshape(-1)[self.here]

    def in_place(self, value_TE: Tensor) -> Tensor:
        """A value of the tokens here among all tokens, 0 for those elsewhere."""
        behind = self.shape[0] * self.shape[1] - self.here.stop
        return F.pad(value_TE, (0, 0, self.here.start, behind)) if self.here.start or behind else value_TE


class MoELayer(nn.Module):
    """A feed-forward of routed experts with an optional shared expert.

    `dispatcher`, `sum_over_ranks` and `tokens` are the places where `parallel` reaches in: the first brings rows to
    experts elsewhere, the second adds integer counts over the processes of a step, the third says which of the tokens
    are here where the processes of a group share them. On one device they do nothing special.
    """

    def __init__(self, width: int, config: MoEConfig, shared: nn.Module | None, number: int = 0) -> None:
        super().__init__()
        self.config = config
        self.number = number
        self.router = build_router(width, config, number)
        self.experts = Experts(width, config)
        self.shared = shared
        gated, latent = shared is not None and config.shared_expert_gate, config.latent_width
        self.shared_gate = Linear(width, 1, bias=False) if gated else None
        self.latent_in = Linear(width, latent, bias=False) if latent else None
        self.latent_out = Linear(latent, width, bias=False) if latent else None
        self.dispatcher: Dispatcher = LocalDispatcher(config.weigh == "input")
        self.sum_over_ranks: Callable[[Tensor], Tensor] = _only_here
        self.tokens: TokenShare = AllTokens()

    def forward(
        self,
        x_BSD: Tensor,
        counted_BS: Tensor | None = None,
        context: RoutingContext | None = None,
        places: object = None,
    ) -> tuple[Tensor, MoERecord]:
        """Routes, computes and combines.

        Args:
            x_BSD: Input; of the tokens here, [1, t, D], where other processes route the others.
            counted_BS: False for padding, which no routed expert sees; None where all count.
            context: Token ids and random numbers, for routers that use them, and choices to be followed.
            places: Where tokens stand, handed on to the shared expert.
        """
        shape = x_BSD.shape[:2] if context is None else context.token_BS.shape
        batch = _Batch((shape[0], shape[1]), counted_BS, self.tokens.here(shape.numel()))
        context = None if context is None else replace(context, here=batch.here)
        x_TD = x_BSD.flatten(0, 1)
        decision = self.router(x_TD, context)
        chosen = self._of_all_tokens(decision)
        whole = self._plan(decision, chosen, batch, None if context is None else context.followed(self.number))
        plan = self._plan_here(whole, decision, batch)
        out_TD, journey = self._through_experts(x_TD, self._weights(decision, plan), plan)
        if self.shared is not None:
            out_TD = out_TD + self._shared(x_BSD, places).flatten(0, 1)
        balance_demand_XE = self._balance_demand(chosen, whole, plan, batch, context)
        return out_TD.view_as(x_BSD), self._record(decision, plan, journey, batch, balance_demand_XE)

    def _through_experts(self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan) -> tuple[Tensor, Journey]:
        """The routed experts, in the latent space where the config has one: tokens are projected before they travel."""
        z_TD = x_TD if self.latent_in is None else self.latent_in(x_TD)
        here = isinstance(self.dispatcher, LocalDispatcher) and self.config.weigh == "output"
        if here and self.experts.takes_tokens(z_TD):
            out_TD, journey = self.experts.of_tokens(z_TD, gate_TK, plan), Journey(plan.slot_N.numel())
        else:
            out_TD, journey = self.dispatcher.run(z_TD, gate_TK, plan, self.experts)
        return (out_TD if self.latent_out is None else self.latent_out(out_TD)), journey

    def _shared(self, x_BSD: Tensor, places: object) -> Tensor:
        assert self.shared is not None, "asked only where there is a shared expert"
        out_BSD = self.shared(x_BSD) if places is None else self.shared(x_BSD, places)
        return out_BSD if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_BSD)) * out_BSD

    def _of_all_tokens(self, decision: RoutingDecision) -> tuple[Tensor, Tensor | None]:
        """(experts, whether they are asked) of every token of the micro-batch."""
        asks_TK = None if decision.asks_TK is None else self.tokens.whole(decision.asks_TK)
        return self.tokens.whole(decision.expert_TK), asks_TK

    def _plan(
        self, decision: RoutingDecision, chosen: tuple[Tensor, Tensor | None], batch: _Batch, follow: Choices | None
    ) -> RoutingPlan:
        """The rows of all tokens; where choices are followed, those that were kept before are kept again."""
        capacity, shape_BSE = Capacity.of(self.config, self.training), (*batch.shape, self.config.num_experts)
        expert_TK, asks_TK = chosen
        if follow is not None:
            kept_TK = self.tokens.whole(follow.kept_TK)
            return follow_plan(expert_TK, kept_TK, batch.counted_BS, shape_BSE, capacity, asks_TK)
        probability_TK = decision.probability_TE.detach().gather(1, decision.expert_TK)
        if capacity is not None:
            probability_TK = self.tokens.whole(probability_TK)  # in whose order choices are dropped
        return make_plan(expert_TK, probability_TK, batch.counted_BS, shape_BSE, capacity, asks_TK)

    def _plan_here(self, whole: RoutingPlan, decision: RoutingDecision, batch: _Batch) -> RoutingPlan:
        """The rows of the tokens here."""
        if whole.kept_TK.shape == decision.expert_TK.shape:
            return whole
        demand_E = demand_of(decision.expert_TK, batch.counted_T, decision.asks_TK, self.config.num_experts)
        return replace(whole.part(batch.here.start, batch.here.stop), demand_E=demand_E)

    def _weights(self, decision: RoutingDecision, plan: RoutingPlan) -> Tensor:
        """Gate weights of kept choices; after drops those left may be scaled to the sum before."""
        if plan.keeps_all or not self.config.renormalize_after_drop:
            return decision.gate_TK
        kept_TK = decision.gate_TK * plan.kept_TK
        left_T1 = kept_TK.sum(-1, keepdim=True)
        whole_T1 = decision.gate_TK.sum(-1, keepdim=True)
        return kept_TK * (whole_T1 / torch.where(left_T1 > 0, left_T1, torch.ones_like(left_T1)))

    def _record(
        self, decision: RoutingDecision, plan: RoutingPlan, journey: Journey, batch: _Batch, demand_XE: Tensor
    ) -> MoERecord:
        groups, counted_T = self.config.num_groups, batch.counted_T
        probability_TE = batch.in_place(decision.probability_TE)
        probability_BE = balance.probability_by_sequence(probability_TE, batch.counted_BS, batch.shape[1])
        in_groups = (balance.sum_in_groups(value, groups) for value in (probability_BE, demand_XE))
        return MoERecord(
            decision,
            plan,
            journey,
            balance_sum=balance.balance_sum(probability_BE, demand_XE),
            group_balance_sum=balance.balance_sum(*in_groups),
            z_sum=balance.z_sum(decision.logits_TE, counted_T),
            balance_demand_XE=demand_XE,
            probability_E=probability_BE.detach().sum(0),
            entropy_sum=balance.entropy_sum(decision.probability_TE, counted_T),
            first=batch.here.start,
        )

    def _balance_demand(
        self,
        chosen: tuple[Tensor, Tensor | None],
        whole: RoutingPlan,
        plan: RoutingPlan,
        batch: _Batch,
        context: RoutingContext | None,
    ) -> Tensor:
        """The demand that the balance terms take, int64 [X, E]: over sets of tokens that are here in part or whole."""
        match self.config.balance_scope:
            case "sequence":
                length, experts = batch.shape[1], self.config.num_experts
                return balance.demand_by_sequence(chosen[0], batch.counted_BS, length, experts, chosen[1])
            case "micro_batch":
                return whole.demand_E[None]
        return self._global_demand(plan.demand_E, context)[None]

    def _global_demand(self, demand_E: Tensor, context: RoutingContext | None) -> Tensor:
        """Demand that the global balance term takes, int64 [E]: known before, or asked of all ranks."""
        if context is not None and context.taken_demand is not None:
            return context.taken_demand[self.number][0]
        known = None if context is None or context.demand is None else context.demand[self.number]
        if known is None:
            return self.sum_over_ranks(demand_E)
        if self.config.global_balance == "running":
            return known + self.sum_over_ranks(demand_E)
        return known


def _only_here(counts: Tensor) -> Tensor:
    return counts
