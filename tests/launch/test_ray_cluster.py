"""Ranks as a Ray Train worker group, on one cluster of two nodes that all tests but the last ones share."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.generations import run_on_ray
from launch.ray_cluster import Cluster, connect, gpus_per_worker
from moe_dist.config import Config, parse_config
from moe_dist.errors import ConfigError, DataError, LayoutError, TrainingFault
from tests.launch.conftest import alive, behave, command, descendants, events, wait_until
from tests.launch.driver import WORKER

Start = Callable[[str], "subprocess.Popen[str]"]


def config_of(run_dir: Path, **launch: object) -> Config:
    return parse_config({"run": {"dir": str(run_dir)}, "launch": {"workers": 2, **launch}})


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from ray.cluster_utils import Cluster as TestCluster

    nodes = TestCluster()
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=2, include_dashboard=False)
        config = config_of(tmp_path_factory.mktemp("none"), placement="strict_spread")
        with connect(config, nodes.address) as cluster:
            yield cluster
    finally:
        nodes.shutdown()


def test_run_on_ray_strict_spread_puts_ranks_on_two_nodes(two_nodes: Cluster, run_dir: Path) -> None:
    behave(run_dir, steps=3)
    config = config_of(run_dir, placement="strict_spread")
    summary = run_on_ray(config, run_dir, two_nodes, WORKER)
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert len({worker["node"] for worker in summary["workers"]}) == 2
    assert not two_nodes.started_here
    assert summary["environment"]["OMP_NUM_THREADS"] == "1"
    assert int(summary["environment"]["MALLOC_TRIM_THRESHOLD_"]) >= 1 << 30


def test_run_on_ray_killed_worker_restarts_the_gang_and_resumes(two_nodes: Cluster, run_dir: Path) -> None:
    behave(run_dir, steps=6, die={"rank": 1, "step": 4})
    summary = run_on_ray(config_of(run_dir), run_dir, two_nodes, WORKER)
    first, second = events(run_dir, "start")
    assert (first["first_step"], second["first_step"]) == (0, 3)
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    assert second["time"] > float((run_dir / "died").read_text())


def test_run_on_ray_named_error_reaches_the_driver_without_a_retry(two_nodes: Cluster, run_dir: Path) -> None:
    behave(run_dir, steps=1000, **{"raise": {"rank": 1, "step": 3, "kind": "DataError"}})
    with pytest.raises(DataError) as caught:
        run_on_ray(config_of(run_dir), run_dir, two_nodes, WORKER)
    assert (caught.value.where, caught.value.fix) == ("shard 7", "build it again")
    assert len(events(run_dir, "start")) == 1
    assert not list(run_dir.glob("ray/error-*"))


@pytest.mark.slow
def test_run_on_ray_bug_is_retried_and_then_told(two_nodes: Cluster, run_dir: Path) -> None:
    behave(run_dir, steps=1000, **{"raise": {"rank": 1, "step": 3, "kind": "bug"}})
    with pytest.raises(TrainingFault) as caught:
        run_on_ray(config_of(run_dir, max_failures=1), run_dir, two_nodes, WORKER)
    assert caught.value.where == "rank 1"
    assert caught.value.value == "ZeroDivisionError: a bug in the model"
    assert len(events(run_dir, "start")) == 2


def test_gpus_per_worker_impossible_placement_names_the_nearest_fix() -> None:
    cluster = Cluster("", False, ({"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}))
    for launch, rule, fix in (
        ({"workers": 8}, "can place 6 ranks of 1 CPUs", "launch.workers=6"),
        ({"workers": 3, "placement": "strict_spread"}, "can place 2 ranks", "launch.placement=spread"),
        ({"workers": 1, "cpus_per_worker": 8.0}, "can place 0 ranks", "nodes of at least 8 CPUs"),
        ({"workers": 2, "gpus_per_worker": 1.0}, "and 1 GPUs", "launch.workers=1"),
    ):
        with pytest.raises(LayoutError) as caught:
            gpus_per_worker(config_of(Path(), **launch), cluster)
        assert rule in caught.value.rule
        assert fix in caught.value.fix
    assert gpus_per_worker(config_of(Path(), workers=2), cluster) == 0
    assert gpus_per_worker(config_of(Path(), workers=1), cluster) == 1


def test_connect_started_here_ctrl_c_stops_after_a_step(start_driver: Start, run_dir: Path) -> None:
    behave(run_dir, steps=10_000, step_seconds=0.05)
    driver = start_driver("ray")
    wait_until(lambda: events(run_dir, "step"), 90, "the first step")
    below = descendants(driver.pid)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: it must not reach Ray's own processes
    out, err = driver.communicate(timeout=30)
    assert (out.strip(), driver.returncode) == ("interrupted", 0), err
    assert len(events(run_dir, "start")) == 1
    wait_until(lambda: not any(map(alive, below)), 15, "the end of the cluster")


@pytest.mark.slow
def test_connect_started_here_second_ctrl_c_ends_everything_at_once(start_driver: Start, run_dir: Path) -> None:
    behave(run_dir, steps=10, step_seconds=600)
    driver = start_driver("ray")
    wait_until(lambda: events(run_dir, "start"), 90, "the start")
    below = descendants(driver.pid)
    os.killpg(driver.pid, signal.SIGINT)
    wait_until((run_dir / "stop-requested").exists, 5, "the stop file")
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=20) == 130
    wait_until(lambda: not any(map(alive, below)), 15, "the end of the cluster")


@pytest.mark.slow
def test_connect_started_here_driver_killed_ends_ranks_and_cluster(start_driver: Start, run_dir: Path) -> None:
    behave(run_dir, steps=10_000, step_seconds=0.05)
    driver = start_driver("ray")
    wait_until(lambda: events(run_dir, "step"), 90, "the first step")
    # Ray's two agents try to tell the dead cluster of its end for about a minute, and then end as well.
    below = [pid for pid in descendants(driver.pid) if "Agent" not in command(pid)]
    ranks = [worker["pid"] for worker in events(run_dir, "start")[0]["workers"]]
    assert set(ranks) < set(below)
    driver.kill()
    wait_until(lambda: not any(map(alive, below)), 20, "the end of the cluster")


def test_connect_nobody_at_the_address_is_a_named_error(run_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught, connect(config_of(run_dir), "127.0.0.1:1"):
        pass
    assert caught.value.where == "--address"
