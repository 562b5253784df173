"""The router of a layer: from hidden states to a decision, in fp32 or wider whatever the model's type.

Shape letters: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import MoEConfig
from moe_dist.moe import randomness, router_kinds
from moe_dist.moe.decision import RoutingContext, RoutingDecision
from moe_dist.moe.ledger import Choices
from moe_dist.moe.randomness import Draw

__all__ = ["HashRouter", "Router", "RoutingDecision", "build_router"]


def build_router(width: int, config: MoEConfig, layer: int) -> Router | HashRouter:
    """The router that a config asks for; `layer` tells the random numbers and hashes of layers apart."""
    return HashRouter(config, layer) if config.router == "hash" else Router(width, config, layer)


class Router(nn.Module):
    """Scores every expert by a linear map and decides as `config.router` says.

    Attributes:
        weight: [E, D].
        bias: [E], learned and added to the logits; None but with `router_bias`.
        noise_weight: [E, D], the learned spread of the noise; None but for `noisy_topk`.
        selection_bias: fp32 [E], used for the choice alone and never in gates; None where the config has none. It is
            moved once a step by `moved_bias` and stays fp32 when the module is cast.
    """

    selection_bias: Tensor | None

    def __init__(self, width: int, config: MoEConfig, layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        noisy = config.router == "noisy_topk"
        self.noise_weight = nn.Parameter(torch.empty(config.num_experts, width)) if noisy else None
        bias_E = torch.zeros(config.num_experts, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("selection_bias", bias_E)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> RoutingDecision:
        """Args: x_TD: hidden states. context: ids and random numbers; needed in training by routers that draw."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            if self.config.input_jitter and self.training:
                x_TD = self._jittered(x_TD, _keys(context))
            bias_E = None if self.bias is None else self.bias.to(x_TD.dtype)
            return self._decide(x_TD, F.linear(x_TD, self.weight.to(x_TD.dtype), bias_E), context)

    def _decide(self, x_TD: Tensor, logits_TE: Tensor, context: RoutingContext | None) -> RoutingDecision:
        config, follow = self.config, _followed(context, self.layer)
        match config.router:
            case "softmax_topk" | "switch":
                return router_kinds.softmax_topk(logits_TE, config, self.selection_bias, follow)
            case "sigmoid_topk":
                return router_kinds.sigmoid_topk(logits_TE, config, self.selection_bias, follow)
            case "gshard":
                return router_kinds.gshard_top2(logits_TE, config, self._chance_of_second(context), follow)
            case "noisy_topk":
                return router_kinds.softmax_topk(self._noisy(x_TD, logits_TE, context), config, None, follow)
            case "expert_choice":
                return router_kinds.expert_choice(logits_TE, config)
        raise AssertionError(f"the config tree allows no router {config.router!r} here")

    def _jittered(self, x_TD: Tensor, keys: _Keys) -> Tensor:
        """`x * uniform[1 - jitter, 1 + jitter)`. Source: Fedus et al. 2022 (Switch), appendix C."""
        draw, position_T = keys
        channel_D = torch.arange(x_TD.shape[1], device=x_TD.device)
        name = (draw.seed, draw.step, randomness.JITTER, self.layer, position_T[:, None], channel_D)
        return x_TD * (1 + self.config.input_jitter * (2 * randomness.uniform(*name) - 1)).to(x_TD.dtype)

    def _chance_of_second(self, context: RoutingContext | None) -> Tensor | None:
        if not self.training:
            return None
        draw, position_T = _keys(context)
        return randomness.uniform(draw.seed, draw.step, randomness.SECOND_EXPERT, self.layer, position_T)

    def _noisy(self, x_TD: Tensor, logits_TE: Tensor, context: RoutingContext | None) -> Tensor:
        if not self.training:
            return logits_TE
        assert self.noise_weight is not None, "a noisy router has the weights of its noise"
        draw, position_T = _keys(context)
        expert_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
        name = (draw.seed, draw.step, randomness.NOISE, self.layer, position_T[:, None], expert_E)
        spread_TE = x_TD @ self.noise_weight.to(x_TD.dtype).T
        return router_kinds.noisy_logits(logits_TE, spread_TE, randomness.normal(*name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves and casts as any module, but never casts the selection bias: bf16 would swallow its small moves."""
        kept = self.selection_bias
        super()._apply(fn, recurse)
        moved = self.selection_bias
        if kept is not None and moved is not None and moved.dtype != torch.float32:
            self.selection_bias = kept.to(moved.device)
        return self


class HashRouter(nn.Module):
    """Sends every token where the hash of its id says; it has no weights."""

    def __init__(self, config: MoEConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> RoutingDecision:
        """Args: x_TD: only its type and device matter. context: the token ids."""
        assert context is not None, "hash routing needs the token ids: pass a RoutingContext"
        exact = torch.promote_types(x_TD.dtype, torch.float32)
        follow = context.followed(self.layer)
        return router_kinds.hash_routing(context.token_T, self.layer, self.config, exact, follow)


def _followed(context: RoutingContext | None, layer: int) -> Choices | None:
    return None if context is None else context.followed(layer)


_Keys = tuple[Draw, Tensor]


def _keys(context: RoutingContext | None) -> _Keys:
    """The draw of this forward and the global position of each token, int64 [T]."""
    assert context is not None and context.draw is not None, (
        "this router draws random numbers in training: pass a RoutingContext with a Draw, or call .eval()"
    )
    return context.draw, context.position_T
