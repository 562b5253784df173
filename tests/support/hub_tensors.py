"""The tensors of a hub directory, to be compared to the byte."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_dist.checkpoint.write import bytes_of
from moe_dist.interop.names import Key
from moe_dist.interop.shards import Shards


def hub_tensors(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor of a directory."""
    with Shards(folder) as shards:
        read = {name: shards.read(Key(name)) for name in shards.names()}
        return {name: (value.dtype, tuple(value.shape), bytes(bytes_of(value))) for name, value in read.items()}
