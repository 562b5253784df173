"""Causal attention. Shape letters: B batch, S sequence, R tokens that may be seen, D model width, H query heads, G
key/value heads, C head width, V value width.

Equations, shapes and sources: docs/model.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.model.norm import RMSNorm
from moe_dist.model.places import Places
from moe_dist.model.rope import rotate
from moe_dist.moe.product import Linear


class Attention(nn.Module):
    """Each key/value head serves H/G query heads. Source: Ainslie et al. 2023 (GQA).

    `number` counts the blocks from 0: it says which have a window, and names what a cache keeps of this one.
    """

    def __init__(self, config: ModelConfig, number: int = 0) -> None:
        super().__init__()
        asked, width = config.attention, config.head_width
        self.head_width, self.interleaved = width, config.rope_pairing == "interleaved"
        self.name, self.window = f"{number}.attention", window_of(config, number)
        self.query = Linear(config.width, config.num_heads * width, bias=asked.qkv_bias)
        self.key = Linear(config.width, config.num_kv_heads * width, bias=asked.qkv_bias)
        self.value = Linear(config.width, config.num_kv_heads * width, bias=asked.qkv_bias)
        self.output = Linear(config.num_heads * width, config.width, bias=asked.output_bias)
        self.qk_norm = asked.qk_norm
        if self.qk_norm != "none":
            heads = (1, 1) if self.qk_norm == "head" else (config.num_heads, config.num_kv_heads)
            self.query_norm, self.key_norm = (RMSNorm(h * width, config.norm_eps) for h in heads)
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if asked.sinks else None

    def forward(self, x_BSD: Tensor, places: Places) -> Tensor:
        query_BHSC, key_BGSC = self._normed(self.query(x_BSD), "query_norm"), self._normed(self.key(x_BSD), "key_norm")
        table = places.cos, places.sin
        query_BHSC, key_BGSC = (rotate(x, table, self.interleaved) for x in (query_BHSC, key_BGSC))
        value_BGSC = self._heads(self.value(x_BSD))
        if places.cache is not None:
            key_BGSC, value_BGSC = self._with_those_before(key_BGSC, value_BGSC, places)
        scale = self.head_width**-0.5
        mixed_BHSC = attend((query_BHSC, key_BGSC, value_BGSC), seen_by(self.window, places), scale, self.sinks)
        return self.output(mixed_BHSC.transpose(1, 2).flatten(2))

    def _normed(self, x: Tensor, norm: str) -> Tensor:
        """The heads, normed one by one, together or not at all."""
        if self.qk_norm == "whole":
            return self._heads(getattr(self, norm)(x))
        return self._heads(x) if self.qk_norm == "none" else getattr(self, norm)(self._heads(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _with_those_before(self, key_BGSC: Tensor, value_BGSC: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Keys and values that may be seen: on the first call the new ones, then those of the cache."""
        cache = places.cache
        assert cache is not None, "called with a cache"
        new_BSX = torch.cat([key_BGSC, value_BGSC], dim=-1).transpose(1, 2).flatten(2)
        kept_BRX = cache.ring(self.name, new_BSX, self.window)
        if cache.is_empty:
            return key_BGSC, value_BGSC
        key_BGRC, value_BGRC = kept_BRX.unflatten(-1, (-1, 2 * self.head_width)).transpose(1, 2).chunk(2, dim=-1)
        return key_BGRC, value_BGRC


def window_of(config: ModelConfig, number: int) -> int | None:
    """Tokens that a token sees in a block, itself included; None for all."""
    every = config.attention.full_every_layers
    return None if every and number % every == every - 1 else config.attention.window_tokens


def seen_by(window: int | None, places: Places) -> Tensor | None:
    """What a layer's tokens see, bool [B or 1, 1, S, R]; None for all before them."""
    return places.sees if window is None else places.near


def attend(parts: tuple[Tensor, Tensor, Tensor], sees: Tensor | None, scale: float, sinks_H: Tensor | None) -> Tensor:
    """Values [B, H, S, V] weighed by the softmax of scaled scores.

    A sink is a score of its head that takes part in the softmax and carries no value (gpt-oss). It is the score of one
    more key, whose value is 0: the heads that share a key each have a channel of their own, in which the query is 1 and
    that key the head's sink. So any kernel of `scaled_dot_product_attention` does it, and no mask has heads.

    Args:
        parts: Query [B, H, S, C], key [B, G, R, C], value [B, G, R, V].
        sees: bool [B or 1, 1, S, R]; None where every token sees all before it.
        scale: Factor on the scores.
        sinks_H: Score of each head's sink; None without.
    """
    query, key, value = parts
    width = value.shape[-1]
    if sinks_H is not None:
        assert sees is not None, "a sink is seen by all, which must be said"
        batch, heads, length, _ = query.shape
        shared = heads // key.shape[1]
        own_H = torch.eye(shared, dtype=query.dtype, device=query.device).repeat(key.shape[1], 1)
        query = torch.cat([query, own_H[:, None].expand(batch, heads, length, shared)], dim=-1)
        sink = F.pad((sinks_H / scale).to(key.dtype).view(1, -1, 1, shared), (key.shape[-1], 0))
        key = torch.cat([sink.expand(batch, -1, 1, -1), F.pad(key, (0, shared))], dim=2)
        value, sees = F.pad(value, (0, 0, 1, 0)), F.pad(sees, (1, 0), value=True)
    # Kernels that keep no scores want equal widths.
    value = F.pad(value, (0, max(0, key.shape[-1] - width)))
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=sees, is_causal=sees is None, scale=scale, enable_gqa=True
    )
    return mixed[..., :width]
