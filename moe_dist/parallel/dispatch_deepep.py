"""An adapter to DeepEP (github.com/deepseek-ai/DeepEP): its kernels move the tokens, de-duplicated by node and rank.

Shape letters: T tokens here, D model width, K experts per token, E experts, M tokens received, R rows at the experts.

Of DeepEP this uses `Buffer.get_dispatch_layout`, `Buffer.dispatch` and `Buffer.combine` (1.x; 2.x keeps them). Dispatch
copies a token to every rank that holds one of its experts and combine adds up what those ranks return, so each is the
other's gradient. Tokens, results and their gradients travel in bf16, gate weights in fp32: DeepEP has no other types.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.errors import LayoutError
from moe_dist.moe.dispatch import ApplyExperts, Journey, weigh_rows
from moe_dist.moe.plan import RoutingPlan
from moe_dist.parallel.choices import expert_of_rows
from moe_dist.parallel.fan import Fan, fan_in, fan_out


@dataclass(frozen=True)
class DeepEPDispatcher:
    """Runs over one expert group; every rank holds equally many experts.

    Attributes:
        buffer: `deep_ep.Buffer` of the group.
        weigh_input: Gate weights multiply what experts receive, not what they return.
        row_type: Of tokens and results under way.
        gate_type: Of gate weights under way.
    """

    buffer: Any
    weigh_input: bool = False
    row_type: torch.dtype = torch.bfloat16
    gate_type: torch.dtype = torch.float32

    def run(self, x_TD: Tensor, gate_TK: Tensor, plan: RoutingPlan, experts: ApplyExperts) -> tuple[Tensor, Journey]:
        expert_TK = torch.full_like(plan.row_TK, -1)
        expert_TK.view(-1)[plan.slot_N] = expert_of_rows(plan)
        layout = self.buffer.get_dispatch_layout(expert_TK, plan.served_E.numel())[:4]
        visit = _Visit(self.buffer, expert_TK, layout)
        tokens_MD, gate_MK = _Dispatch.apply(x_TD.to(self.row_type), gate_TK.to(self.gate_type), visit)
        here_MK = visit.expert_MK >= 0
        order_R = torch.sort(visit.expert_MK[here_MK], stable=True).indices
        row_R = torch.empty_like(order_R)
        row_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        fan = Fan.of(here_MK.sum(1), row_R)
        rows_RD, gate_R = fan_out(tokens_MD, fan).to(x_TD.dtype), gate_MK[here_MK].index_select(0, order_R)
        if self.weigh_input:
            y_RD = experts(weigh_rows(rows_RD, gate_R), visit.counts_L)
            sums_MD = fan_in(y_RD, None, fan)
        else:
            y_RD = experts(rows_RD, visit.counts_L)
            sums_MD = fan_in(y_RD, gate_R, fan)
        out_TD = _Combine.apply(sums_MD.to(self.row_type), visit)
        return out_TD.to(y_RD.dtype), Journey(y_RD.shape[0], self._bytes_sent(visit, tokens_MD, expert_TK, gate_MK))

    def _bytes_sent(self, visit: _Visit, tokens_MD: Tensor, expert_TK: Tensor, gate_MK: Tensor) -> int:
        """As if every rank were reached directly, and without DeepEP's own counts."""
        tokens_W = visit.layout[0].tolist()
        stay = tokens_W[self.buffer.group.rank()]
        row = tokens_MD.shape[1] * tokens_MD.element_size()
        choices = expert_TK.shape[1] * (expert_TK.element_size() + gate_MK.element_size())
        return (sum(tokens_W) - stay) * (row + choices) + (tokens_MD.shape[0] - stay) * row


class _Visit:
    """One dispatch and the combine that undoes it: what DeepEP says about it on the way."""

    def __init__(self, buffer: Any, expert_TK: Tensor, layout: tuple[Tensor, Tensor | None, Tensor, Tensor]) -> None:
        self.buffer, self.expert_TK, self.layout = buffer, expert_TK, layout
        self.expert_MK = expert_TK  # until dispatch: those of the tokens received, counted from this rank's first
        self.counts_L: list[int] = []
        self.handle: Any = None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gate_TK: Tensor, visit: _Visit) -> tuple[Tensor, Tensor]:
        ctx.visit = visit
        by_rank, by_node, by_expert, goes_TW = visit.layout
        tokens_MD, visit.expert_MK, gate_MK, visit.counts_L, visit.handle, _ = visit.buffer.dispatch(
            x_TD.contiguous(),
            topk_idx=visit.expert_TK,
            topk_weights=gate_TK.contiguous(),
            num_tokens_per_rank=by_rank,
            num_tokens_per_rdma_rank=by_node,
            is_token_in_rank=goes_TW,
            num_tokens_per_expert=by_expert,
        )
        return tokens_MD, gate_MK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        visit: _Visit = ctx.visit
        grad_TD, slope_TK, _ = visit.buffer.combine(
            grads[0].contiguous(), visit.handle, topk_weights=grads[1].contiguous()
        )
        return grad_TD, slope_TK, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums_MD: Tensor, visit: _Visit) -> Tensor:
        ctx.visit = visit
        return visit.buffer.combine(sums_MD.contiguous(), visit.handle)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.visit.buffer.dispatch(grads[0].contiguous(), handle=ctx.visit.handle)[0], None


def open_buffer(group: dist.ProcessGroup, experts_by_rank: list[range], width: int) -> Any:
    """DeepEP's buffer for rows of `width` values; entered by all ranks of the group.

    Raises:
        LayoutError: DeepEP is not installed or does not serve so many ranks, or ranks hold unequal numbers of experts.
    """
    fix = "parallel.dispatch=deduplicated"
    sizes = {len(experts) for experts in experts_by_rank}
    if len(sizes) > 1:
        rule = f"every rank must hold equally many experts, not {' or '.join(map(str, sorted(sizes)))}"
        raise LayoutError("parallel.dispatch", "deepep", rule, fix)
    try:
        deep_ep = importlib.import_module("deep_ep")
    except ImportError as error:
        rule = f"needs the module deep_ep, which cannot be imported ({error})"
        raise LayoutError("parallel.dispatch", "deepep", rule, f"install DeepEP, or {fix}") from error
    ranks, row_bytes = dist.get_world_size(group), width * 2
    try:
        configs = (deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Buffer.get_combine_config(ranks))
    except AssertionError as error:  # DeepEP's table holds 2, 4, 8, ... ranks
        raise LayoutError("parallel.dispatch", "deepep", f"DeepEP refuses {ranks} ranks ({error})", fix) from error
    inside = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
    between = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
    return deep_ep.Buffer(group, inside, between)
