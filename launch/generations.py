"""A run on Ray, generation by generation: ranks are started on the nodes there are, watched, and started again.

    nodes -> how many ranks -> layout -> ranks -> ended well | lost a rank | hangs | nodes come or go -> nodes -> ...

Every generation restores the newest state that proves whole, whatever layout wrote it, and goes on in the same order of
the data. A generation that made no new step counts as a failure; so many in a row as `launch.max_failures` are borne.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.failure import RankError, first_cause, in_a_line, read_once
from launch.hang_watch import HangWatch
from launch.interrupt import StopRequest, to_stderr
from launch.keepers import Keepers
from launch.local import DEFAULT_WORKER
from launch.one_launcher import only_launcher
from launch.placement import Node, place, places
from launch.ray_cluster import Cluster, living_nodes, needs_of_rank
from launch.ray_gang import RayGang, Task, caught
from launch.refit import refitted
from launch.run_directory import reached_step, resolve_paths, tell_attempt
from moe_dist.checkpoint.store import sweep
from moe_dist.config import Config
from moe_dist.errors import TrainingFault
from moe_dist.runtime.generation import begin_generation

_LAST_WORDS_SECONDS = 1.5  # after a first failure: time for the others to say whether theirs came earlier
_SLOW_START_SECONDS = 30.0


def run_on_ray(
    config: Config,
    build_dir: Path,
    cluster: Cluster,
    worker: str = DEFAULT_WORKER,
    say: Callable[[str], None] = to_stderr,
) -> dict[str, Any]:
    """Runs a configuration on a cluster and waits for it.

    Args:
        config: The checked configuration.
        build_dir: Built shards, visible on every node.
        cluster: What `connect` yielded.
        worker: `module:function` that every rank calls with config, build directory and process.
        say: Shows a line to the person.

    Returns:
        The summary that rank 0 returned.

    Raises:
        MoeDistError: What a rank raised; such errors are not retried.
        TrainingFault: Any other failure, where generations in a row made no new step, with the rank's own message.
        ConfigError: Another launcher is at work on this run.
        KeyboardInterrupt: Ctrl-C was pressed twice.
    """
    config = resolve_paths(config)  # workers have another working directory
    run_dir = Path(config.run.dir)
    (run_dir / "ray").mkdir(parents=True, exist_ok=True)
    with (
        only_launcher(run_dir),
        StopRequest(run_dir, say) as stop,
        (run_dir / "ray" / "driver.log").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),  # raylets report dead workers there, at length
    ):
        run = Generations(config, build_dir, (cluster, worker), stop, say)
        try:
            return run.to_the_end()
        finally:
            run.keepers.end()


class Generations:
    """The generations of one run.

    Args:
        config: With absolute paths.
        build_dir: Built shards.
        where: The cluster, and what every rank calls.
        stop: What the person asks.
        say: Shows a line to the person.
    """

    def __init__(
        self,
        config: Config,
        build_dir: Path,
        where: tuple[Cluster, str],
        stop: StopRequest,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.build_dir, self.stop, self.say = config, build_dir, stop, say
        self.cluster, self.worker = where
        self.run_dir, self.needs = Path(config.run.dir), needs_of_rank(config, self.cluster)
        self.failures, self.reached = 0, reached_step(self.run_dir)
        self.keepers = Keepers()

    def to_the_end(self) -> dict[str, Any]:
        """Generation after generation, until one ends well or the person stops the run."""
        while True:
            ended = self._generation()
            self.stop.withdraw()
            if isinstance(ended, Exception):
                self._after(ended)
            elif ended.get("status") != "interrupted" or self.stop.asked:
                return ended

    def _after(self, error: Exception) -> None:
        """Counts a failure, and raises it where it is one too many."""
        reached = reached_step(self.run_dir)
        self.failures = 1 if reached > self.reached else self.failures + 1
        self.reached = max(reached, self.reached)
        if self.failures > self.config.launch.max_failures:
            raise error
        self.say(f"{in_a_line(error)}; starting again from the newest checkpoint")

    def _generation(self) -> dict[str, Any] | Exception:
        """One start of all ranks, and how it ended."""
        nodes, ranks = self._room()
        config = refitted(self.config, ranks, self.say)
        number = begin_generation(self.run_dir)
        sweep(self.run_dir / "checkpoints")  # what an older generation may still be writing can then not be published
        error_file = self.run_dir / "ray" / f"error-{uuid.uuid4().hex}.json"
        placed = place(nodes, self.needs, config.launch.placement, ranks)
        living = [node.name for node in nodes]
        keepers = self.keepers.on(placed, living) if config.checkpoint.memory_every_steps else {}
        task = Task(config, self.build_dir, self.worker, error_file, number, placed, keepers)
        self.say(f"starting {ranks} ranks")
        tell_attempt(self.run_dir)
        watch = HangWatch(self.run_dir, ranks, number, config.launch.hang_timeout_seconds)
        gang = RayGang(task, self.needs)
        try:
            return _Supervision(self, gang, watch).outcome()
        finally:
            gang.end()
            error_file.unlink(missing_ok=True)

    def _room(self) -> tuple[list[Node], int]:
        """The living nodes and the number of ranks for them; waits while there is room for too few."""
        workers, told = self.config.launch.workers, False
        while True:
            nodes = living_nodes()
            room = places(nodes, self.needs, self.config.launch.placement)
            if room >= workers.min:
                return nodes, min(room, workers.max)
            if not told:
                self.say(f"waiting for nodes: room for {room} ranks, the run needs {workers.min}")
                told = True
            if self.stop.abort_asked() or self.stop.asked:
                raise KeyboardInterrupt
            time.sleep(self.config.launch.preemption_poll_seconds)


class _Supervision:
    """One generation under the eyes of the driver."""

    def __init__(self, run: Generations, gang: RayGang, watch: HangWatch) -> None:
        self.run, self.gang, self.watch = run, gang, watch
        self.results: dict[int, Any] = {}
        self.looked, self.more_room, self.resized = time.monotonic(), 0, False
        self.missing: set[str] = set()
        self.slow_at: float | None = time.monotonic() + _SLOW_START_SECONDS

    def outcome(self) -> dict[str, Any] | Exception:
        """The summary of rank 0, or what made an end to the generation.

        Raises:
            MoeDistError: A rank's named error, which is not retried.
            KeyboardInterrupt: Ctrl-C was pressed twice.
        """
        from ray.exceptions import RayError

        while len(self.results) < len(self.gang.nodes):
            if self.run.stop.abort_asked():
                raise KeyboardInterrupt
            try:
                started = self.gang.started()
            except RayError as error:
                return caught(0, error).exception()
            if not started:
                self._tell_of_a_slow_start()
                continue
            self.results |= self.gang.ended()
            if self._errors():
                return self._failed()
            hanging = self.watch.look()
            if hanging is not None:
                return hanging
            self._look_at_the_cluster()
        self._raise_named()
        return self.results[0] or {}

    def _errors(self) -> list[RankError]:
        return [caught(rank, found) for rank, found in self.results.items() if isinstance(found, BaseException)]

    def _failed(self) -> Exception:
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline and len(self.results) < len(self.gang.nodes):
            self.results |= self.gang.ended()
        self._raise_named()
        cause = first_cause(self._errors())
        fix = "correct the cause; the same command then continues from the newest checkpoint"
        rule = "generations may fail launch.max_failures times in a row without a new step"
        value = cause.text.strip() if cause.fields else f"{cause.kind}: {cause.text.strip()}"
        return TrainingFault(f"rank {cause.rank}", value, rule, fix)

    def _raise_named(self) -> None:
        named = read_once(self.gang.task.error_file)
        if named is not None:
            raise named.exception()

    def _tell_of_a_slow_start(self) -> None:
        if self.slow_at is not None and time.monotonic() > self.slow_at:
            self.slow_at = None
            import ray

            free = ray.available_resources().get("CPU", 0)
            self.run.say(f"still waiting for {len(self.gang.nodes)} ranks; the cluster has {free:g} CPUs free now")

    def _look_at_the_cluster(self) -> None:
        """Asks the ranks to save and end where one of their nodes is to go away, or more ranks have room."""
        launch = self.run.config.launch
        if self.resized or time.monotonic() - self.looked < launch.preemption_poll_seconds:
            return
        self.looked, ranks = time.monotonic(), len(self.gang.nodes)
        nodes = living_nodes()
        # Seen twice: a busy node may fail to answer once; one that is gone ends the generation by itself.
        missing = set(self.gang.nodes) - {node.name for node in nodes}
        leaving, self.missing = missing & self.missing, missing
        room = min(places(nodes, self.run.needs, launch.placement), launch.workers.max)
        self.more_room = self.more_room + 1 if room > ranks else 0
        if leaving:
            self._resize(f"{len(leaving)} of {len(set(self.gang.nodes))} nodes are to go away")
        elif self.more_room > 1:  # seen twice: a node that has just come is still settling
            self._resize(f"the cluster has room for {room} ranks")

    def _resize(self, why: str) -> None:
        self.resized = True
        self.run.say(f"{why}: saving, and going on with what is there")
        self.run.stop.ask_ranks()
