"""Where tokens stand in their document, and which tokens they see.

Shape letters: B sequences, S tokens of a sequence, C head width.

    token      a b . c d e . f      (. is end-of-text)
    position   0 1 2 0 1 2 3 0      documents that do not see each other; joined ones count on: 0 1 2 3 4 5 6 7
    sees from  0 0 0 3 3 3 3 7      the place of the first token that is seen, up to the token itself
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.model.rope import rope_table


class Places(NamedTuple):
    """What attention is told of a micro-batch; made once, and read by every layer.

    Attributes:
        cos: Cosines of the rotary embedding, [S, C/2], or [B, 1, S, C/2] where positions differ by row.
        sin: Sines, likewise.
        sees: Which tokens each token sees, bool [B, 1, S, S]; None where it sees all before it in its row.
    """

    cos: Tensor
    sin: Tensor
    sees: Tensor | None = None


def document_positions(tokens_BS: Tensor, end_of_text: int) -> Tensor:
    """Position of every token in its document, int64 [B, S]: a row begins one, and so does what follows end-of-text."""
    place_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    follows_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    follows_BS[:, 1:] = tokens_BS[:, :-1] == end_of_text
    return place_S - torch.where(follows_BS, place_S, 0).cummax(dim=1).values


def places_of(position_BS: Tensor | None, length: int, shape: tuple[int, float], like: Tensor) -> Places:
    """What attention must know of a micro-batch.

    Args:
        position_BS: Of each token in its document, whose tokens see no other; None where every row is one document.
        length: Tokens of a row, S.
        shape: Width of a head, and the base of the rotary embedding.
        like: Gives device and type.
    """
    cos, sin = rope_table(length, *shape, like)
    if position_BS is None:
        return Places(cos, sin)
    place_S = torch.arange(length, device=like.device)
    first_BS1 = (place_S - position_BS)[..., None]
    sees_BSS = (place_S >= first_BS1) & (place_S <= place_S[:, None])
    return Places(cos[position_BS][:, None], sin[position_BS][:, None], sees_BSS[:, None])
