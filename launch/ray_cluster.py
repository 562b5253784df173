"""Ray: joins or starts a cluster, checks that it can hold the ranks, and says which nodes live."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from launch.access import TOKEN_FIX, answers, offer_token, protect_token, running_here
from launch.environment import cores
from launch.placement import Needs, Node, places
from moe_dist.config import Config
from moe_dist.errors import ConfigError, LayoutError

# Ray's settings, each of which a variable of the same name overrides.
_RAY_SETTINGS = {
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
        return 1.0 if _places(config, cluster, 1.0) >= config.launch.workers.min else _checked(config, cluster, 0.0)
    return _checked(config, cluster, wanted)


def needs_of_rank(config: Config, cluster: Cluster) -> Needs:
    """What one rank takes of a node."""
    return Needs(config.launch.cpus_per_worker, gpus_per_worker(config, cluster))


def living_nodes() -> list[Node]:
    """The nodes that ranks can be started on now: alive, reachable, and not about to be taken away.

    Ray finds out that a node is gone when it has missed some health checks, which takes many seconds; its raylet's port
    says so at once.
    """
    import ray
    from ray._private.state import state

    try:
        leaving = set(state.get_draining_nodes())
    except AttributeError:  # not a public part of Ray
        leaving = set()
    found = []
    for node in ray.nodes():
        port = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        if node["Alive"] and node["NodeID"] not in leaving and answers(port):
            found.append(Node(node["NodeID"], dict(node["Resources"])))
    return found


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
    return int(-(-config.launch.workers.max * config.launch.cpus_per_worker // 1))


def _places(config: Config, cluster: Cluster, gpus: float) -> int:
    """Ranks that the cluster could hold if nothing else ran on it."""
    nodes = [Node(str(number), resources) for number, resources in enumerate(cluster.nodes)]
    return places(nodes, Needs(config.launch.cpus_per_worker, gpus), config.launch.placement)


def _checked(config: Config, cluster: Cluster, gpus: float) -> float:
    """Returns `gpus` if the cluster can hold the ranks, or the fewest of them."""
    launch = config.launch
    room = _places(config, cluster, gpus)
    if room >= launch.workers.min:
        return gpus
    has = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in cluster.nodes)
    each = f"{launch.cpus_per_worker:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    apart = ", each on its own node (launch.placement=strict_spread)" if launch.placement == "strict_spread" else ""
    fix = f"launch.workers={room}" if room else f"a cluster with nodes of at least {each}"
    if apart and room:
        fix += ", or launch.placement=spread"
    raise LayoutError(
        "launch.workers",
        launch.workers.min,
        f"the cluster can place {room} ranks of {each}{apart}; its {len(cluster.nodes)} nodes have: {has}",
        fix,
    )
