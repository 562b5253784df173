"""Multi-head latent attention (DeepSeek-V2, DeepSeek-V3).

Shape letters: B batch, S sequence, R tokens that may be seen, D model width, H heads, C channels of a head that are not
turned by position, P channels that are, V value width, Z width of the latent that keys and values come from.

    token D    query_down, query_norm, query_up    query  [H, C + P]              P channels turned
               kv_down                             latent Z, and P channels       P channels turned
    latent Z   kv_norm, kv_up                      key    [H, C], value [H, V]    to each key the same P channels

What a token is known by to later ones is Z + P numbers. A cache keeps these alone, and a token that comes behind it
makes no keys and values of others: `kv_up` is applied to its query, and to what the scores bring back.
Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1 and appendix C.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.model.attention import attend, seen_by, window_of
from moe_dist.model.norm import RMSNorm
from moe_dist.model.places import Places
from moe_dist.model.rope import rotate, score_factor
from moe_dist.moe.product import Linear


class LatentAttention(nn.Module):
    """Keys and values of all heads from one latent; `number` counts the blocks from 0, as in `Attention`."""

    def __init__(self, config: ModelConfig, number: int = 0) -> None:
        super().__init__()
        asked, widths = config.attention, config.attention.latent
        self.plain, self.turned, self.value_width = config.head_width, widths.rope_width, widths.value_width
        self.rank, self.interleaved = widths.kv_rank, config.rope_pairing == "interleaved"
        self.name, self.window = f"{number}.attention", window_of(config, number)
        each = self.plain + self.turned
        self.scale = each**-0.5 * score_factor(config.rope_scaling)
        if widths.query_rank is None:
            self.query = Linear(config.width, config.num_heads * each, bias=False)
        else:
            self.query_down = Linear(config.width, widths.query_rank, bias=False)
            self.query_norm = RMSNorm(widths.query_rank, config.norm_eps)
            self.query_up = Linear(widths.query_rank, config.num_heads * each, bias=False)
        self.kv_down = Linear(config.width, self.rank + self.turned, bias=False)
        self.kv_norm = RMSNorm(self.rank, config.norm_eps)
        self.kv_up = Linear(self.rank, config.num_heads * (self.plain + self.value_width), bias=False)
        self.output = Linear(config.num_heads * self.value_width, config.width, bias=asked.output_bias)
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if asked.sinks else None

    def forward(self, x_BSD: Tensor, places: Places) -> Tensor:
        query_BHSC, query_BHSP = self._queries(x_BSD, places)
        latent_BSZ, shared_BSP = self.kv_down(x_BSD).split((self.rank, self.turned), dim=-1)
        latent_BSZ = self.kv_norm(latent_BSZ)
        shared_B1SP = rotate(shared_BSP[:, None], (places.cos, places.sin), self.interleaved)
        kept_BRX = None
        if places.cache is not None:
            known_BSX = torch.cat([latent_BSZ, shared_B1SP[:, 0]], dim=-1)
            kept_BRX = places.cache.ring(self.name, known_BSX, self.window)
        if kept_BRX is None or places.cache is None or places.cache.is_empty:
            mixed_BHSV = self._mixed((query_BHSC, query_BHSP), latent_BSZ, shared_B1SP, places)
        else:
            mixed_BHSV = self._mixed_by_latents(query_BHSC, query_BHSP, kept_BRX, places)
        return self.output(mixed_BHSV.transpose(1, 2).flatten(2))

    def _queries(self, x_BSD: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """The part of each head that is not turned, and the part that is."""
        whole = self.query(x_BSD) if hasattr(self, "query") else self.query_up(self.query_norm(self.query_down(x_BSD)))
        heads = whole.unflatten(-1, (-1, self.plain + self.turned)).transpose(1, 2)
        query_BHSC, query_BHSP = heads.split((self.plain, self.turned), dim=-1)
        return query_BHSC, rotate(query_BHSP, (places.cos, places.sin), self.interleaved)

    def _mixed(self, query: tuple[Tensor, Tensor], latent_BSZ: Tensor, shared_B1SP: Tensor, places: Places) -> Tensor:
        """Values of the tokens here, weighed; every head has keys and values of its own."""
        heads = self.kv_up(latent_BSZ).unflatten(-1, (-1, self.plain + self.value_width)).transpose(1, 2)
        key_BHSC, value_BHSV = heads.split((self.plain, self.value_width), dim=-1)
        key = torch.cat([key_BHSC, shared_B1SP.expand(-1, key_BHSC.shape[1], -1, -1)], dim=-1)
        parts = torch.cat(query, dim=-1), key, value_BHSV
        return attend(parts, seen_by(self.window, places), self.scale, self.sinks)

    def _mixed_by_latents(self, query_BHSC: Tensor, query_BHSP: Tensor, kept_BRX: Tensor, places: Places) -> Tensor:
        """The same of kept tokens: latents are the keys and values of one head that all query heads share."""
        up_HXZ = self.kv_up.weight.unflatten(0, (-1, self.plain + self.value_width))
        key_HCZ, value_HVZ = up_HXZ.split((self.plain, self.value_width), dim=1)
        query_BHSX = torch.cat([query_BHSC @ key_HCZ, query_BHSP], dim=-1)
        parts = query_BHSX, kept_BRX[:, None], kept_BRX[:, None]
        mixed_BHSX = attend(parts, seen_by(self.window, places), self.scale, self.sinks)
        return mixed_BHSX[..., : self.rank] @ value_HVZ.mT
