"""`torch.compile` of what is dense in a block: attention, norms, dense and shared feed-forwards.

Routing, exchange and experts are left as they are: their shapes are those of the data, their products are one kernel or
written by hand, and whatever waits for other ranks must stay where every rank meets it. So no compiled part holds a
collective, and a part compiles alike whatever the layout, recompute and sharing out are around it: these wrap it.

The modules of a model share their code, so each kind is compiled once for a shape, and once more for all shapes when a
second one comes.
"""

from __future__ import annotations

import torch

from moe_dist.model.attention import Attention
from moe_dist.model.feed_forward import FeedForward
from moe_dist.model.latent_attention import LatentAttention
from moe_dist.model.norm import RMSNorm
from moe_dist.model.transformer import Transformer


def compile_blocks(model: Transformer) -> None:
    """Compiles the dense parts of every block, beneath the hooks that exchange tokens around them."""
    for module in model.blocks.modules():
        if isinstance(module, Attention | LatentAttention | FeedForward | RMSNorm):
            # This one module's forward: its parameters keep their names, and hooks run outside.
            setattr(module, "forward", torch.compile(module.forward))  # noqa: B010 - a method is replaced
