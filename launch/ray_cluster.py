"""Ray: joins or starts a cluster, checks that it can hold the ranks, and runs them as a Ray Train worker group.

The worker group restarts as a whole when a rank dies, and every rank resumes from the newest committed checkpoint by
itself. Ray is told nothing about checkpoints or metrics: `ray.train.report` waits for a controller that polls, and Ray
retries a broken checkpoint until its budget is spent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.access import TOKEN_FIX, answers, offer_token, protect_token, running_here
from launch.environment import cores, rank_environment
from launch.failure import RankError, first_cause, read_once, write_once
from launch.interrupt import StopRequest, to_stderr
from launch.local import DEFAULT_WORKER, load_worker
from launch.run_directory import resolve_paths, tell_attempt
from moe_dist.config import Config
from moe_dist.errors import ConfigError, LayoutError, TrainingFault
from moe_dist.train import PROGRESS_FILE

_POLL_SECONDS = 0.2
_PEER_ERROR_SECONDS = 3.0  # a rank that lost its peers waits so long for the named error that may explain it
_LEAVE_SECONDS = 10.0  # and one that hangs after another's named error is ended after so long
_SLOW_START_SECONDS = 30.0

# Ray's settings, each of which a variable of the same name overrides.
_RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead rank is noticed; Ray's 2 s would add to every restart
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to.

    Args:
        address: Where it is.
        started_here: Whether this process started it, on this machine, and stops it.
        nodes: What each living node has, by resource name.
    """

    address: str
    started_here: bool
    nodes: tuple[dict[str, float], ...]


@dataclasses.dataclass(frozen=True)
class _Task:
    """What every rank of a run is told."""

    config: Config
    build_dir: Path
    worker: str
    error_file: Path


@contextlib.contextmanager
def connect(config: Config, address: str | None = None) -> Iterator[Cluster]:
    """Joins the cluster at `address`, at RAY_ADDRESS, or the running one of this machine; else starts one here.

    Args:
        config: `launch.*` says what the cluster must be able to hold.
        address: `host:port`, or `local` to start a new one whatever is running.

    Yields:
        The cluster, found large enough; on leaving, it is disconnected from, or stopped if it was started here.

    Raises:
        ConfigError: No cluster answers at the address.
        LayoutError: The cluster can never place the ranks.
    """
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    offer_token(address or os.environ.get("RAY_ADDRESS", ""))
    import ray

    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        started_here = _join_or_start(config, address)
        if started_here:
            # Of use where nodes can be taken away; here one more process to start with every group of workers.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        if in_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)  # ray.init sets its own, which ends the process with status 15
        nodes = tuple(dict(node["Resources"]) for node in ray.nodes() if node["Alive"])
        cluster = Cluster(ray.get_runtime_context().gcs_address, started_here, nodes)
        gpus_per_worker(config, cluster)
        yield cluster
    finally:
        ray.shutdown()


def gpus_per_worker(config: Config, cluster: Cluster) -> float:
    """GPUs of a rank: as configured, else one if every rank can have one, else none.

    Raises:
        LayoutError: The cluster can never place the ranks.
    """
    wanted = config.launch.gpus_per_worker
    if wanted is None:
        return 1.0 if _places(config, cluster, 1.0) >= config.launch.workers else _checked(config, cluster, 0.0)
    return _checked(config, cluster, wanted)


def run_on_ray(
    config: Config,
    build_dir: Path,
    cluster: Cluster,
    worker: str = DEFAULT_WORKER,
    say: Callable[[str], None] = to_stderr,
) -> dict[str, Any]:
    """Runs a configuration as a Ray Train worker group and waits for it.

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
        TrainingFault: Any other failure, after `launch.max_failures` restarts, with the rank's own message.
        KeyboardInterrupt: Ctrl-C was pressed twice.
    """
    config = resolve_paths(config)  # workers have another working directory
    run_dir = Path(config.run.dir)
    task = _Task(config, build_dir.absolute(), worker, run_dir / "ray" / f"error-{uuid.uuid4().hex}.json")
    outcome = _Outcome()
    task.error_file.parent.mkdir(parents=True, exist_ok=True)
    with (
        StopRequest(run_dir, say) as stop,
        (run_dir / "ray" / "driver.log").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),  # raylets report dead workers there, at length
    ):
        fit = threading.Thread(target=outcome.fill, args=(task, cluster), daemon=True, name="ray train")
        say(f"starting {config.launch.workers} ranks")
        tell_attempt(run_dir)
        fit.start()  # not in the main thread, where Ray Train would take over Ctrl-C
        _wait(fit, stop, config, say)
    named = read_once(task.error_file)
    task.error_file.unlink(missing_ok=True)
    if named is not None:
        raise named.exception()
    return outcome.summary()


def _wait(fit: threading.Thread, stop: StopRequest, config: Config, say: Callable[[str], None]) -> None:
    import ray

    progress = Path(config.run.dir) / PROGRESS_FILE
    before = progress.stat().st_size if progress.exists() else 0
    slow_at: float | None = time.monotonic() + _SLOW_START_SECONDS
    while fit.is_alive():
        fit.join(_POLL_SECONDS)
        if stop.abort_asked():
            raise KeyboardInterrupt
        if slow_at is not None and time.monotonic() > slow_at:
            slow_at = None
            if not progress.exists() or progress.stat().st_size == before:
                free = ray.available_resources().get("CPU", 0)
                say(f"still waiting for {config.launch.workers} ranks; the cluster has {free:g} CPUs free now")


class _Outcome:
    """How `trainer.fit` ended, carried out of its thread."""

    def __init__(self) -> None:
        self._value: Any = None
        self._error: BaseException | None = None

    def fill(self, task: _Task, cluster: Cluster) -> None:
        try:
            self._value = _trainer(task, cluster).fit().return_value
        except BaseException as error:  # noqa: BLE001 - raised again by `summary`
            self._error = error

    def summary(self) -> dict[str, Any]:
        if self._error is not None:
            raise _explain(self._error) from self._error
        return self._value or {}


def _trainer(task: _Task, cluster: Cluster) -> Any:
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    launch = task.config.launch
    gpus = gpus_per_worker(task.config, cluster)
    resources = {"CPU": launch.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    return TorchTrainer(
        _run_rank,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=max(1, round(launch.timeout_seconds))),
        scaling_config=ScalingConfig(
            num_workers=launch.workers,
            use_gpu=bool(gpus),
            resources_per_worker=resources,
            placement_strategy=launch.placement.upper(),
        ),
        run_config=RunConfig(
            name="workers",
            storage_path=str(task.error_file.parent),
            failure_config=FailureConfig(max_failures=launch.max_failures),
            worker_runtime_env={"env_vars": rank_environment(task.config, launch.cpus_per_worker)},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _run_rank(given: dict[str, Any]) -> dict[str, Any] | None:
    """The life of a rank inside its Ray Train worker; runs on the worker."""
    import ray
    from ray.train import get_context

    from moe_dist.runtime.process import Place, open_process

    task: _Task = given["task"]
    if read_once(task.error_file) is not None:
        return None  # started again although a named error was raised: end, so that it can be shown
    ended = threading.Event()
    threading.Thread(target=_leave_after_error, args=(task.error_file, ended), daemon=True).start()
    me = get_context()
    rank = me.get_world_rank()
    node = ray.get_runtime_context().get_node_id()
    place = Place(rank, me.get_world_size(), me.get_local_rank(), me.get_local_world_size(), node)
    try:
        with open_process(place, task.config) as process:
            return load_worker(task.worker)(task.config, task.build_dir, process)
    except Exception as error:
        if _named_error(task.error_file, rank, error):
            return None
        raise
    finally:
        ended.set()


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


def _explain(error: BaseException) -> Exception:
    """Ray Train's error as ours, with the first worker's own message."""
    from ray.train import TrainingFailedError

    if not isinstance(error, TrainingFailedError):
        return RuntimeError(f"Ray Train failed: {error}")
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    found = [RankError.caught(rank, failure) for rank, failure in sorted(failures.items())]
    if found:
        cause = first_cause(found)
        where, value = f"rank {cause.rank}", f"{cause.kind}: {cause.text.strip()}"
    else:
        where, value = "the worker group", str(error)
    return TrainingFault(
        where,
        value,
        "a group of workers may fail launch.max_failures times",
        "correct the cause; the same command then continues from the newest checkpoint",
    )


def _join_or_start(config: Config, address: str | None) -> bool:
    """Connects this process; returns whether it started the cluster."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray").setLevel(logging.ERROR)
    named = address or os.environ.get("RAY_ADDRESS")
    if named == "local" or not (named or running_here()):
        ray.init(address="local", num_cpus=max(cores(), _cpus(config)), include_dashboard=False, **quiet)
        protect_token()
        return True
    try:
        if named and not answers(named):
            raise ConnectionError("nothing listens on that port")
        ray.init(address=named, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            "--address" if address else "RAY_ADDRESS",
            named,
            f"a Ray cluster answers there ({str(error).splitlines()[0]})",
            f"correct the address, or use --address local to start a cluster here; {TOKEN_FIX}",
        ) from None
    return False


def _cpus(config: Config) -> int:
    return int(-(-config.launch.workers * config.launch.cpus_per_worker // 1))


def _places(config: Config, cluster: Cluster, gpus: float) -> int:
    """Ranks that the cluster could hold if nothing else ran on it."""
    counts = []
    for node in cluster.nodes:
        count = node.get("CPU", 0.0) / config.launch.cpus_per_worker
        if gpus:
            count = min(count, node.get("GPU", 0.0) / gpus)
        counts.append(int(count + 1e-9))
    if config.launch.placement == "strict_spread":
        return sum(count > 0 for count in counts)
    return sum(counts)


def _checked(config: Config, cluster: Cluster, gpus: float) -> float:
    """Returns `gpus` if the cluster can hold the ranks."""
    launch = config.launch
    places = _places(config, cluster, gpus)
    if places >= launch.workers:
        return gpus
    has = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in cluster.nodes)
    each = f"{launch.cpus_per_worker:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    apart = ", each on its own node (launch.placement=strict_spread)" if launch.placement == "strict_spread" else ""
    fix = f"launch.workers={places}" if places else f"a cluster with nodes of at least {each}"
    if apart and places:
        fix += ", or launch.placement=spread"
    raise LayoutError(
        "launch.workers",
        launch.workers,
        f"the cluster can place {places} ranks of {each}{apart}; its {len(cluster.nodes)} nodes have: {has}",
        fix,
    )
