"""The ranks of one generation as Ray actors: started on chosen nodes, waited for, ended together.

An actor is one process with one rank. It runs `launch.train.run_worker` like any other launcher's rank, and tells the
driver nothing but how that ended: figures, checkpoints and heartbeats go by the run's directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from launch.environment import rank_environment
from launch.failure import RankError, read_once, write_once
from launch.keepers import RayKeeper
from launch.local import load_worker
from launch.placement import Needs
from moe_dist.config import Config

_PEER_ERROR_SECONDS = 3.0  # a rank that lost its peers waits so long for the named error that may explain it
_LEAVE_SECONDS = 10.0  # and one that hangs after another's named error is ended after so long
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Task:
    """What every rank of a generation is told.

    Attributes:
        config: The configuration, for this number of ranks.
        build_dir: Built shards.
        worker: `module:function` that every rank calls.
        error_file: Where a named error is left.
        generation: Which start this is.
        nodes: The node of every rank.
        keepers: Actors that keep states in memory, by node; none where none are kept.
    """

    config: Config
    build_dir: Path
    worker: str
    error_file: Path
    generation: int
    nodes: list[str]
    keepers: dict[str, Any]


class RankActor:
    """One rank; `ray.remote` makes an actor of it."""

    def rendezvous(self) -> str:
        """An address where the ranks can meet at this process's machine, if this is to be rank 0."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as opened:
            opened.bind((host, 0))
            return f"tcp://{host}:{opened.getsockname()[1]}"

    def run(self, task: Task, place: dict[str, Any], init_method: str) -> dict[str, Any] | None:
        """The life of the rank; None where a named error explains its end, which lies in `task.error_file`."""
        from moe_dist.runtime.process import Place, open_process

        ended = threading.Event()
        threading.Thread(target=_leave_after_error, args=(task.error_file, ended), daemon=True).start()
        try:
            with open_process(Place(**place), task.config, init_method) as joined:
                keeper = RayKeeper(task.keepers, task.nodes, joined.rank) if task.keepers else None
                process = dataclasses.replace(joined, keeper=keeper)
                try:
                    return load_worker(task.worker)(task.config, task.build_dir, process)
                except Exception as error:  # told before the group closes: its closing makes the peers fail too
                    if _named_error(task.error_file, process.rank, error):
                        return None
                    raise
        finally:
            ended.set()


class RayGang:
    """The actors of one generation.

    Args:
        task: What they are to do, and where.
        needs: What a rank takes.
    """

    def __init__(self, task: Task, needs: Needs) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        kind: Any = ray.remote(RankActor)
        variables = rank_environment(task.config, needs.cpus)
        self.nodes = task.nodes
        self.actors: list[Any] = [
            kind.options(
                num_cpus=needs.cpus,
                num_gpus=needs.gpus,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                runtime_env={"env_vars": variables},
            ).remote()
            for node in task.nodes
        ]
        self.task = task
        self._results: dict[Any, int] = {}
        self._meeting = self.actors[0].rendezvous.remote()

    def started(self) -> bool:
        """Whether rank 0's process runs, after which all are told to begin.

        Raises:
            ray.exceptions.RayError: It cannot be started.
        """
        import ray

        if self._results:
            return True
        ready, _ = ray.wait([self._meeting], timeout=_POLL_SECONDS)
        if not ready:
            return False
        address = ray.get(self._meeting)
        for rank, actor in enumerate(self.actors):
            here = [other for other, node in enumerate(self.nodes) if node == self.nodes[rank]]
            place: dict[str, Any] = {"rank": rank, "world_size": len(self.nodes), "local_rank": here.index(rank)}
            place |= {"local_world_size": len(here), "node": self.nodes[rank], "generation": self.task.generation}
            self._results[actor.run.remote(self.task, place, address)] = rank
        return True

    def ended(self) -> dict[int, Any]:
        """Ranks that ended since the last question, with what they returned or the exception that ended them."""
        import ray

        waiting = list(self._results)
        done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_SECONDS) if waiting else ([], [])
        found: dict[int, Any] = {}
        for result in done:
            rank = self._results.pop(result)
            try:
                found[rank] = ray.get(result)
            except ray.exceptions.RayError as error:
                found[rank] = error
        return found

    def end(self) -> None:
        """Ends every process of the gang at once."""
        import ray

        for actor in self.actors:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor, no_restart=True)


def caught(rank: int, error: BaseException) -> RankError:
    """What ended a rank: its own exception, or the loss of its process or node."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        found = RankError.caught(rank, error.cause if isinstance(error.cause, BaseException) else error)
        return dataclasses.replace(found, trace=str(error))
    if isinstance(error, RayActorError):
        return RankError.killed(rank, f"its process or node is gone ({str(error).splitlines()[0]})")
    return RankError.caught(rank, error)


def _named_error(error_file: Path, rank: int, error: Exception) -> bool:
    """Whether a named error explains this failure: this one, which is recorded, or one of another rank."""
    from moe_dist.runtime.process import leave_group

    found = RankError.caught(rank, error)
    if found.fields is not None:
        write_once(error_file, found)
        leave_group()  # the peers' collectives then fail, instead of waiting
        return True
    deadline = time.monotonic() + _PEER_ERROR_SECONDS
    while time.monotonic() < deadline:
        if read_once(error_file) is not None:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _leave_after_error(error_file: Path, ended: threading.Event) -> None:
    """Ends a rank that hangs in a collective after another one's named error."""
    seen: float | None = None
    while not ended.wait(1.0):
        if seen is None and read_once(error_file) is not None:
            seen = time.monotonic()
        if seen is not None and time.monotonic() - seen > _LEAVE_SECONDS:
            os._exit(1)
