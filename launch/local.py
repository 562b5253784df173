"""N ranks as processes of this machine: gloo, one file for the rendezvous, no Ray and no network port to choose.

No process outlives the launcher: a rank watches its parent, and the launcher kills the others when one fails.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launch.environment import cores, rank_environment, variables_set
from launch.failure import RankError, first_cause, in_a_line
from launch.hang_watch import HangWatch
from launch.interrupt import StopRequest, heed_signals_of_a_rank, to_stderr
from launch.one_launcher import only_launcher
from launch.run_directory import reached_step, tell_attempt
from launch.shared_memory import Files, kept_memory
from moe_dist.config import Config
from moe_dist.runtime.generation import begin_generation

DEFAULT_WORKER = "launch.train:run_worker"
_POLL_SECONDS = 0.2
_OTHERS_REPORT_SECONDS = 1.0  # after a first failure: time for the others to say whether theirs came earlier


@dataclasses.dataclass(frozen=True)
class _Task:
    """What every rank of a run is told."""

    config: Config
    build_dir: Path
    ranks: int
    worker: str
    memory: Files | None
    init_method: str = ""
    generation: int = 0


@dataclasses.dataclass
class _Rank:
    """A rank as its launcher sees it."""

    process: BaseProcess
    results: Connection
    summary: dict[str, Any] | None = None
    error: RankError | None = None
    ended: bool = False


def run_local(
    config: Config, build_dir: Path, ranks: int, worker: str = DEFAULT_WORKER, say: Callable[[str], None] = to_stderr
) -> dict[str, Any]:
    """Runs a configuration as processes of this machine and waits for them.

    With `checkpoint.memory_every_steps` a lost rank does not end the run: all ranks start again, as on Ray.

    Args:
        config: The checked configuration.
        build_dir: Built shards.
        ranks: Number of processes.
        worker: `module:function` that every rank calls with config, build directory and process.
        say: Shows a line to the person.

    Returns:
        The summary that rank 0 returned.

    Raises:
        MoeDistError: What the first failing rank raised, or `TrainingFault` when one was killed.
        RankCrash: Any other exception of a rank, with its traceback.
        TrainingFault: A rank hangs.
        ConfigError: Another launcher is at work on this run.
        KeyboardInterrupt: Ctrl-C was pressed twice.
    """
    run_dir = Path(config.run.dir)
    with only_launcher(run_dir), StopRequest(run_dir, say) as stop, kept_memory(config, ranks) as memory:
        failures, reached = 0, reached_step(run_dir)
        while True:
            ended = _generation(_Task(config, build_dir, ranks, worker, memory), stop)
            if not isinstance(ended, Exception):
                return ended
            failures = 1 if reached_step(run_dir) > reached else failures + 1
            reached = max(reached, reached_step(run_dir))
            if memory is None or stop.asked or failures > config.launch.max_failures:
                raise ended
            say(f"{in_a_line(ended)}; starting again from the newest state")


def _generation(task: _Task, stop: StopRequest) -> dict[str, Any] | Exception:
    """One start of all ranks: the summary of rank 0, or how a rank was lost, which another start may mend."""
    run_dir, ranks = Path(task.config.run.dir), task.ranks
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as folder:
        task = dataclasses.replace(
            task, init_method=f"file://{folder}/rendezvous", generation=begin_generation(run_dir)
        )
        watch = HangWatch(run_dir, ranks, task.generation, task.config.launch.hang_timeout_seconds)
        gang: list[_Rank] = []
        tell_attempt(run_dir)
        try:
            # No GPU is shown to the ranks: several of them cannot share one in NCCL.
            with variables_set(rank_environment(task.config, cores() / ranks) | {"CUDA_VISIBLE_DEVICES": ""}):
                for rank in range(ranks):
                    gang.append(_start(task, rank))
            lost = _supervise(gang, stop, watch)
        finally:
            _end(gang)
    return lost or gang[0].summary or {}


def load_worker(name: str) -> Callable[..., dict[str, Any]]:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _start(task: _Task, rank: int) -> _Rank:
    context: Any = multiprocessing.get_context("spawn" if task.memory is None else "forkserver")
    if (
        task.memory is not None
    ):  # ranks that may have to start again soon find what they import in a process that has it
        context.set_forkserver_preload([task.worker.partition(":")[0]])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_rank_main, args=(task, rank, sending), name=f"rank {rank}", daemon=True)
    process.start()
    sending.close()
    return _Rank(process, receiving)


def _supervise(gang: list[_Rank], stop: StopRequest, watch: HangWatch) -> Exception | None:
    """Returns None when every rank has ended well, or the loss of a rank; raises the first failure of another kind."""
    while not all(rank.ended for rank in gang):
        _receive(gang, _POLL_SECONDS)
        if stop.abort_asked():
            raise KeyboardInterrupt
        if any(rank.error for rank in gang):
            deadline = time.monotonic() + _OTHERS_REPORT_SECONDS
            while time.monotonic() < deadline and not all(rank.ended or rank.error for rank in gang):
                _receive(gang, _POLL_SECONDS)
            cause = first_cause([rank.error for rank in gang if rank.error])
            if cause.lost:
                return cause.exception()
            raise cause.exception()
        hanging = watch.look()
        if hanging is not None:
            return hanging
    return None


def _receive(gang: list[_Rank], seconds: float) -> None:
    """Waits for messages and ends of ranks, and records them."""
    wait([rank.results for rank in gang if not rank.ended], timeout=seconds)
    for number, rank in enumerate(gang):
        if rank.ended:
            continue
        gone = rank.process.exitcode is not None  # looked up before the pipe, so that a last message is not missed
        try:
            while rank.results.poll():
                message = rank.results.recv()
                if isinstance(message, RankError):
                    rank.error = message
                else:
                    rank.summary = message
        except (EOFError, OSError):
            rank.process.join()
            gone = True
        if gone:
            rank.ended = True
            if rank.summary is None and rank.error is None:
                rank.error = RankError.killed(number, _how_it_ended(rank.process.exitcode))


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _end(gang: list[_Rank]) -> None:
    for rank in gang:
        if rank.process.is_alive():
            rank.process.kill()
    for rank in gang:
        rank.process.join()
        rank.results.close()


def _rank_main(task: _Task, rank: int, results: Connection) -> None:
    """The life of a rank's process."""
    heed_signals_of_a_rank(Path(task.config.run.dir))
    threading.Thread(target=_die_with_parent, daemon=True, name="parent watch").start()
    os.dup2(2, 1)  # standard output belongs to the launcher's result
    try:
        results.send(_run_rank(task, rank, results))
    except _Reported:
        os._exit(1)  # no orderly tear-down: it would wait for peers that may be gone
    except BaseException as error:  # noqa: BLE001 - every failure is told to the launcher
        results.send(RankError.caught(rank, error))
        os._exit(1)


class _Reported(Exception):
    """The rank's error has already been sent."""


def _run_rank(task: _Task, rank: int, results: Connection) -> dict[str, Any]:
    from moe_dist.checkpoint.memory import FileKeeper
    from moe_dist.runtime.process import Place, open_process

    run_worker = load_worker(task.worker)
    place = Place(rank, task.ranks, rank, task.ranks, "local", task.generation)
    with open_process(place, task.config, task.init_method) as joined:
        keeper = None if task.memory is None else FileKeeper(task.memory)
        process = dataclasses.replace(joined, keeper=keeper)
        try:
            return run_worker(task.config, task.build_dir, process)
        except BaseException as error:
            # Told before the process group closes: its closing makes the peers fail too.
            results.send(RankError.caught(rank, error))
            raise _Reported from error


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when the parent is gone, however it ended
        os._exit(1)
