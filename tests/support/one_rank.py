"""torch.distributed with one rank in this process, for proofs of a whole step that need no second one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def one_rank() -> Iterator[None]:
    """A gloo world of this process alone; a world that is there already is used as it is."""
    if dist.is_initialized():
        yield
        return
    hook = sys.excepthook  # torch.distributed wraps it anew every time
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
