"""The top-k softmax router: scores, choice of experts, gate weights. Always in fp32 or wider.

Shape letters: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_dist.config import MoEConfig


@dataclass(frozen=True)
class RoutingDecision:
    """What the router says about each token, before any capacity is applied.

    Attributes:
        logits_TE: Raw scores, fp32 or wider.
        probability_TE: Softmax of the scores over all experts.
        expert_TK: Chosen experts, most probable first, int64; ties go to the lower expert id.
        gate_TK: Weight of each chosen expert, differentiable.
    """

    logits_TE: Tensor
    probability_TE: Tensor
    expert_TK: Tensor
    gate_TK: Tensor


class Router(nn.Module):
    """Chooses `top_k` experts a token by the softmax of a linear score.

    Source: Shazeer et al. 2017, equation 2 without noise; Mixtral (Jiang et al. 2024), section 2.1, for gates that are
    normalised over the chosen experts. The normalised gate is computed as a softmax of the chosen logits, which is the
    same number without a division that an epsilon would have to protect.
    """

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))

    def forward(self, x_TD: Tensor) -> RoutingDecision:
        with torch.autocast(x_TD.device.type, enabled=False):
            exact = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = x_TD.to(exact) @ self.weight.to(exact).T
            probability_TE = logits_TE.softmax(-1)
            expert_TK = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices[:, : self.config.top_k]
            gate_TK = self._gates(logits_TE, probability_TE, expert_TK)
        return RoutingDecision(logits_TE, probability_TE, expert_TK, gate_TK)

    def _gates(self, logits_TE: Tensor, probability_TE: Tensor, expert_TK: Tensor) -> Tensor:
        if self.config.normalize_gates:
            gate_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
        else:
            gate_TK = probability_TE.gather(-1, expert_TK)
        return gate_TK * self.config.gate_scale
