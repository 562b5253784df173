"""Runs a function on N gloo processes and gives back what each returned. A rank that hangs or dies is a failure."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


def run_gang(function: Callable[..., Any], ranks: int, *arguments: Any, timeout_seconds: float = 150) -> list[Any]:
    """Calls `function(rank, *arguments)` on every rank with torch.distributed initialised.

    Args:
        function: Importable by name; several checks belong in one call, since starting processes is what costs time.
        ranks: Processes.
        arguments: Passed on; must pickle.
        timeout_seconds: Of the whole call.

    Returns:
        What each rank returned, in order.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        pipes, processes = [], []
        for rank in range(ranks):
            receiving, sending = context.Pipe(duplex=False)
            target = (function, rank, ranks, store, arguments, sending)
            process = context.Process(target=_life, args=target, daemon=True)
            process.start()
            sending.close()
            pipes.append(receiving)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {[r for r in range(len(pipes)) if r not in results]} did not answer in time"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _life(function: Any, rank: int, ranks: int, store: str, arguments: tuple[Any, ...], results: Connection) -> None:
    torch.set_num_threads(1)
    wait_at_most = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=wait_at_most)
    try:
        packed = io.BytesIO()  # as bytes: a tensor in a pipe is a handle that dies with its sender
        torch.save(function(rank, *arguments), packed)
        results.send((True, packed.getvalue()))
    except BaseException:  # noqa: BLE001 - the parent decides what a failure means
        results.send((False, traceback.format_exc()))
    dist.destroy_process_group()
