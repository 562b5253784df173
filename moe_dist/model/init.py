"""Initial weights: a function of (seed, global name) only, so that every layout starts from the same model.

| parameter | initial value |
|---|---|
| norms | 1 |
| what a feed-forward sees of the tokens before: `mix.weight`, `mix.conv.weight`, `mix.wide.weight` | 0 |
| `mix.narrow` of an adapter | normal, `init_std` |
| biases of norms, attention, feed-forwards and experts; sinks | 0 |
| router's selection bias | 0 |
| embedding, positions, router (its bias and noise too), query, key, value, gate_up, up, output | normal, `init_std` |
| attention output, down projections (they write into the residual stream) | normal, `init_std / sqrt(2 * layers)` |

Source: GPT-2 (Radford et al. 2019), section 2.3, for the scaling of residual outputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.model.naming import global_buffers, pieces_by_parameter
from moe_dist.model.transformer import Transformer


def initialise(
    model: Transformer,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    filling: Callable[[Tensor], AbstractContextManager[Tensor]] = nullcontext,
) -> None:
    """Moves a model from `meta` to a device and fills every parameter and buffer held here.

    Numbers are drawn on the CPU in fp32, one stream a global name, and then cast: the device plays no part in them.

    Args:
        model: As cut for this rank.
        seed: Of the run.
        device: Where it goes.
        dtype: Of weights and buffers.
        filling: Gives what is written of a parameter of which this rank keeps a part.
    """
    model.to_empty(device=device)
    model.to(dtype)
    with torch.no_grad():
        for path, pieces in pieces_by_parameter(model):
            with filling(model.get_parameter(path)) as parameter:
                for piece in pieces:
                    target = piece.of(parameter)
                    shape = target.shape if piece.cut is None else piece.cut.whole_shape(target.shape)
                    value = initial_value(piece.name, shape, model.config, seed)
                    target.copy_(value if piece.cut is None else piece.cut.take(value))
        for buffer in global_buffers(model).values():
            buffer.zero_()


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> torch.Tensor:
    """The initial fp32 value of a globally named tensor, on the CPU."""
    path = name.partition("#")[0]
    if path.endswith("norm.weight"):
        return torch.ones(shape)
    if path.endswith((".bias", "_bias", ".sinks")) and ".router." not in path:
        return torch.zeros(shape)
    if path.endswith((".mix.weight", ".mix.conv.weight", ".mix.wide.weight")):
        return torch.zeros(shape)
    writes_residual = path.endswith(("attention.output.weight", ".down.weight", "experts.down", "latent_out.weight"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if writes_residual else config.init_std
    digest = hashlib.blake2b(f"{seed}|init|{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator) * std
