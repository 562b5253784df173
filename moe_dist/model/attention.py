"""Causal grouped-query attention. Shape letters: B batch, S sequence, D model width, H query heads, G key/value
heads, C head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.model.places import Places
from moe_dist.model.rope import rotate


class Attention(nn.Module):
    """Each key/value head serves H/G query heads. Source: Ainslie et al. 2023 (GQA)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.query = nn.Linear(config.width, config.num_heads * config.head_width, bias=False)
        self.key = nn.Linear(config.width, config.num_kv_heads * config.head_width, bias=False)
        self.value = nn.Linear(config.width, config.num_kv_heads * config.head_width, bias=False)
        self.output = nn.Linear(config.num_heads * config.head_width, config.width, bias=False)

    def forward(self, x_BSD: Tensor, places: Places) -> Tensor:
        query_BHSC, key_BGSC, value_BGSC = (self._heads(p(x_BSD)) for p in (self.query, self.key, self.value))
        table, causal = (places.cos, places.sin), places.sees is None
        query_BHSC, key_BGSC = rotate(query_BHSC, table), rotate(key_BGSC, table)
        mixed_BHSC = F.scaled_dot_product_attention(
            query_BHSC, key_BGSC, value_BGSC, attn_mask=places.sees, is_causal=causal, enable_gqa=True
        )
        return self.output(mixed_BHSC.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
