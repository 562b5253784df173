"""Feed-forwards that see the tokens just before: MixFFN for language.

Shape letters: B sequences, S tokens of a sequence, D model width, X channels, K tokens that are seen, R rank.

    conv      hidden = W_1 x;  out = W_2 activation(hidden + sum over j < K of w[:, j] * hidden of the token j before)
    adapter   out = feed_forward(x) + W_wide (z + sum over j < K of w[:, j] * z of the token j before),  z = W_narrow x

A token of another document is not seen, so that j goes no further than the token's place in its own. All `w` and
`W_wide` begin at 0: the model begins as the one without, and decay draws it back to that one.
Source: Xie et al. 2021 (SegFormer), equation 3, which has its convolution of 3 x 3 pixels between the first product and
the activation, without the sum; So et al. 2021 (Primer) for the causal depthwise one of 3 tokens, which they have
behind the projections of attention. Hu et al. 2021 (LoRA) for the adapter and its first values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.model.places import Places
from moe_dist.moe.product import Linear


class CausalMix(nn.Module):
    """Adds to every channel what it was in the tokens before, weighed; causal and depthwise.

    Attributes:
        weight: [X, K]; column j is for the token j before.
        name: By which a cache keeps the last inputs.
    """

    def __init__(self, channels: int, seen: int, name: str) -> None:
        super().__init__()
        self.weight, self.name = nn.Parameter(torch.empty(channels, seen)), name

    def forward(self, x_BSX: Tensor, places: Places) -> Tensor:
        length, before = x_BSX.shape[1], self.weight.shape[1] - 1
        if places.cache is None:
            known_BKX = x_BSX.new_zeros(len(x_BSX), before, x_BSX.shape[2])
        else:
            known_BKX = places.cache.tail(self.name, x_BSX, before)
        line, place_BS = torch.cat([known_BKX, x_BSX], dim=1), places.position_BS
        if place_BS is None:
            place_BS = torch.arange(length, device=x_BSX.device)[None]
        weight, out_BSX = self.weight.to(x_BSX.dtype), x_BSX
        for j in range(before + 1):
            seen_BS1 = (place_BS >= j)[..., None]
            out_BSX = out_BSX + weight[:, j] * line[:, before - j : before - j + length].where(seen_BS1, 0)
        return out_BSX


class Adapter(nn.Module):
    """A narrow way beside a feed-forward, with a mix of tokens in it."""

    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__()
        asked = config.mix
        self.narrow = Linear(config.width, asked.rank, bias=False)
        self.conv = CausalMix(asked.rank, asked.kernel_tokens, name)
        self.wide = Linear(asked.rank, config.width, bias=False)

    def forward(self, x_BSD: Tensor, places: Places) -> Tensor:
        return self.wide(self.conv(self.narrow(x_BSD), places))
