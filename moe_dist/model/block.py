"""One decoder block: attention, then a dense or mixture-of-experts feed-forward, each on a normed residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.model.attention import Attention
from moe_dist.model.feed_forward import FeedForward
from moe_dist.model.latent_attention import LatentAttention
from moe_dist.model.norm import norm_of
from moe_dist.model.places import Places
from moe_dist.moe.decision import RoutingContext
from moe_dist.moe.layer import MoELayer, MoERecord


class Block(nn.Module):
    """Pre-norm block. `feed_forward` is a `FeedForward` or a `MoELayer`; `number` counts the blocks from 0."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.attention_norm = norm_of(config)
        self.attention = (LatentAttention if config.attention.kind == "latent" else Attention)(config, number)
        self.feed_forward_norm = norm_of(config)
        sparse = config.has_experts(number)
        self.feed_forward = _moe_layer(config, number) if sparse else FeedForward(config, config.ffn_width, number)

    def forward(
        self,
        x_BSD: Tensor,
        places: Places,
        counted_BS: Tensor | None,
        context: RoutingContext | None = None,
    ) -> tuple[Tensor, MoERecord | None]:
        x_BSD, normed_BSD = self.attend(x_BSD, places)
        if isinstance(self.feed_forward, MoELayer):
            out_BSD, record = self.feed_forward(normed_BSD, counted_BS, context, places)
            return x_BSD + out_BSD, record
        return x_BSD + self.feed_forward(normed_BSD, places), None

    def attend(self, x_BSD: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """All that comes before the feed-forward: the residual stream after attention, and its norm."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), places)
        return x_BSD, self.feed_forward_norm(x_BSD)


def _moe_layer(config: ModelConfig, number: int) -> MoELayer:
    moe = config.moe
    shared = FeedForward(config, moe.shared_expert_width, number) if moe.shared_expert_width else None
    return MoELayer(config.width, moe, shared, number)
