"""Where tokens stand in their document, and which tokens they see.

Shape letters: B sequences, S tokens of a sequence, R tokens that may be seen (S, or the slots of a cache), C channels
of a head that are turned.

    token      a b . c d e . f      (. is end-of-text)
    position   0 1 2 0 1 2 3 0      documents that do not see each other; joined ones count on: 0 1 2 3 4 5 6 7
    sees from  0 0 0 3 3 3 3 7      the place of the first token that is seen, up to the token itself
    window 2   0 0 1 3 3 4 5 7      the same in a layer with a window
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.model.cache import Cache
from moe_dist.model.rope import rope_table


class Places(NamedTuple):
    """What attention is told of a micro-batch; made once, and read by every layer.

    Attributes:
        cos: Cosines of the rotary embedding, [S, C/2], or [B, 1, S, C/2] where positions differ by row.
        sin: Sines, likewise.
        sees: Which tokens each token sees in a layer without a window, bool [B or 1, 1, S, R]; None where it sees all
            before it in its row.
        near: The same in a layer with a window; None where no layer has one.
        position_BS: Of each token in its document; None where every row is one document that begins here.
        cache: What is kept of tokens before these; None where there are none.
    """

    cos: Tensor
    sin: Tensor
    sees: Tensor | None = None
    near: Tensor | None = None
    position_BS: Tensor | None = None
    cache: Cache | None = None


def document_positions(tokens_BS: Tensor, end_of_text: int) -> Tensor:
    """Position of every token in its document, int64 [B, S]: a row begins one, and so does what follows end-of-text."""
    place_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    follows_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    follows_BS[:, 1:] = tokens_BS[:, :-1] == end_of_text
    return place_S - torch.where(follows_BS, place_S, 0).cummax(dim=1).values


def places_of(position_BS: Tensor | None, length: int, config: ModelConfig, like: Tensor) -> Places:
    """What attention must know of a micro-batch.

    Args:
        position_BS: Of each token in its document, whose tokens see no other; None where every row is one document.
        length: Tokens of a row, S.
        config: Of the model.
        like: Gives device and type.
    """
    place_1S = torch.arange(length, device=like.device)[None]
    cos, sin = rope_table(place_1S[0], config, like)
    asked = config.attention
    first_BS = torch.zeros_like(place_1S) if position_BS is None else place_1S - position_BS
    near = None if asked.window_tokens is None else _sees(place_1S, first_BS, place_1S, asked.window_tokens)
    plain = position_BS is None and not asked.sinks  # all before it: told to the kernel without a mask
    sees = None if plain else _sees(place_1S, first_BS, place_1S)
    if position_BS is None:
        return Places(cos, sin, sees, near)
    return Places(cos[position_BS][:, None], sin[position_BS][:, None], sees, near, position_BS)


def places_behind(cache: Cache, position_BS: Tensor | None, config: ModelConfig, like: Tensor) -> Places:
    """What attention must know of one new token a row, behind those of a cache; arguments as in `places_of`."""
    place_BS = cache.first_places()[:, None]
    position_BS = place_BS if position_BS is None else position_BS
    cos, sin = rope_table(position_BS, config, like)
    first_BS, window = place_BS - position_BS, config.attention.window_tokens
    near = None if window is None else _sees(place_BS, first_BS, cache.slot_places(window), window)
    sees = _sees(place_BS, first_BS, cache.slot_places())
    return Places(cos[:, None], sin[:, None], sees, near, position_BS, cache)


def _sees(place_BS: Tensor, first_BS: Tensor, place_BR: Tensor, window: int | None = None) -> Tensor:
    """Which tokens at places R are seen from places S, bool [B, 1, S, R]; negative places are empty."""
    if window is not None:
        first_BS = torch.maximum(first_BS, place_BS - window + 1)
    seen_BSR = (place_BR[:, None] >= first_BS[..., None]) & (place_BR[:, None] <= place_BS[..., None])
    return seen_BSR[:, None]
