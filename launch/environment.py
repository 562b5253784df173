"""The environment of a rank: memory allocator and thread counts, set before its process starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from moe_dist.config import Config

_KEEP_BYTES = 1 << 30  # glibc then keeps freed blocks below this size, instead of giving pages back at every step


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def rank_environment(config: Config, cores_per_rank: float) -> dict[str, str]:
    """Variables for one rank.

    Args:
        config: `train.threads_per_rank` wins over the cores.
        cores_per_rank: The rank's share of its machine.
    """
    threads = str(config.train.threads_per_rank or max(1, int(cores_per_rank)))
    return {
        "MALLOC_MMAP_THRESHOLD_": str(_KEEP_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(_KEEP_BYTES),
        "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for large pages: products of matrices ran up to 8 % faster
        "GOMP_SPINCOUNT": "10000",  # threads that wait for work soon leave the cores to those that take whole experts
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
    }


@contextlib.contextmanager
def variables_set(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes started inside the block, and puts the old ones back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
