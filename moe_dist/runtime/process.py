"""One rank as a process: its place, its device, and the lifetime of torch.distributed."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.config import Config


@dataclass(frozen=True)
class Place:
    """What a launcher knows of a rank before its process group exists.

    Attributes:
        rank: Place among all ranks.
        world_size: Number of ranks.
        local_rank: Place among the ranks of this node.
        local_world_size: Ranks on this node.
        node: Name of the node, for the record.
        generation: Which start of the run's ranks this is; 0 where nobody counts.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    generation: int = 0


@dataclass(frozen=True, kw_only=True)
class Process(Place):
    """A rank that has joined its group.

    Attributes:
        device: Where its tensors live.
        keeper: Where the launcher keeps states in memory (checkpoint/memory.py); None where it keeps none.
    """

    device: torch.device
    keeper: Any = None


@contextmanager
def open_process(place: Place, config: Config, init_method: str | None = None) -> Iterator[Process]:
    """Joins torch.distributed for the duration of a run.

    A group that already exists is used and left alone.

    Args:
        place: Where this process stands.
        config: For the time-out and the threads.
        init_method: Rendezvous, for example `file:///path`; None where the group exists.
    """
    owns_group = not dist.is_initialized()
    # A group that the launcher started tells by its backend what this rank was given.
    given_gpu = dist.get_backend() == "nccl" if not owns_group else torch.cuda.is_available()
    device = choose_device(place.local_rank) if given_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(config.train.threads_per_rank or share_of_cores(place.local_world_size))
    if owns_group:
        dist.init_process_group(
            backend_for(device),
            init_method=init_method,
            rank=place.rank,
            world_size=place.world_size,
            timeout=datetime.timedelta(seconds=config.launch.timeout_seconds),
        )
    try:
        yield Process(**dataclasses.asdict(place), device=device)
    finally:
        if owns_group:
            dist.destroy_process_group()


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this rank where CUDA has one, otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def backend_for(device: torch.device) -> str:
    """NCCL between GPUs, gloo between CPUs."""
    return "nccl" if device.type == "cuda" else "gloo"


def share_of_cores(local_world_size: int) -> int:
    """Threads of a rank when the cores this process may use are shared evenly."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def leave_group() -> None:
    """Closes torch.distributed at once, so that the collectives of peers fail instead of waiting for this rank."""
    if dist.is_initialized():
        dist.destroy_process_group()
