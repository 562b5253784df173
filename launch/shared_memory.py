"""Memory of the launcher in which the ranks of this machine keep their newest states (checkpoint/memory.py).

The kernel gives it back when the launcher is gone, however it ended: there is nothing to sweep.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_dist.config import Config
from moe_dist.errors import ConfigError

Files = list[list[tuple[Path, Path]]]


@contextlib.contextmanager
def kept_memory(config: Config, ranks: int) -> Iterator[Files | None]:
    """For every rank twice the file of a part and that of its text; None where no states are to be kept.

    Raises:
        ConfigError: This system has no such files.
    """
    if not config.checkpoint.memory_every_steps:
        yield None
        return
    if sys.platform != "linux":
        rule = "states are kept in memory on Linux, and on Ray"
        raise ConfigError("checkpoint.memory_every_steps", config.checkpoint.memory_every_steps, rule, "0")
    handles = [os.memfd_create(f"moe-dist-state-{number}", os.MFD_CLOEXEC) for number in range(4 * ranks)]
    try:
        paths = [Path(f"/proc/{os.getpid()}/fd/{handle}") for handle in handles]
        pairs = list(zip(paths[::2], paths[1::2], strict=True))
        yield [pairs[2 * rank : 2 * rank + 2] for rank in range(ranks)]
    finally:
        for handle in handles:
            os.close(handle)
