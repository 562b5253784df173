"""Runs on a remote cluster as Ray Jobs: ships the three packages and the resolved configuration, and follows the log.

Only code and configuration travel. Text, shards and the run's directory are named by absolute paths, which every node
of the cluster must see.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from launch.access import TOKEN_FIX, offer_token
from launch.interrupt import to_stderr
from launch.run_directory import resolve_paths
from moe_dist.config import Config, load_config
from moe_dist.config.explain import resolved
from moe_dist.config.load import write_yaml
from moe_dist.errors import ConfigError

PACKAGES = ("moe_dist", "data_pipeline", "launch")
_MOST_BYTES = 20_000_000
_POLL_SECONDS = 0.5
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_GRACE_SECONDS = 60  # a stopped job has so long to write its checkpoint


def submit(
    config_path: str, overrides: Sequence[str], address: str, follow: bool = True, log: TextIO | None = None
) -> tuple[str, int]:
    """Starts a training run as a job.

    Args:
        config_path: The YAML file.
        overrides: Items like `train.steps=20`.
        address: The cluster's job server, like `http://head:8265`.
        follow: Shows the job's log until it ends; else returns as soon as the job is accepted.
        log: Where the log goes; standard output by default.

    Returns:
        The job's id, and its exit code (0 when it is not followed).

    Raises:
        ConfigError: The configuration is wrong, or no job server answers.
    """
    config = absolute_with_notes(load_config(config_path, overrides))
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="moe-dist-job-") as folder:
        stage(config, Path(folder))
        job_id = client.submit_job(
            entrypoint="python -m launch.cli train config.yaml",
            runtime_env={
                "working_dir": folder,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_GRACE_SECONDS), "PYTHONUNBUFFERED": "1"},
            },
        )
    to_stderr(f"job {job_id} is on the cluster; `moe-dist logs {job_id} --address {address}` shows its log")
    if not follow:
        return job_id, 0
    return job_id, _follow(client, job_id, log or sys.stdout)


def logs(job_id: str, address: str, follow: bool = True, log: TextIO | None = None) -> int:
    """Writes a job's log, to standard output by default; returns its exit code (0 when it is not followed)."""
    client = _client(address)
    _details(client, job_id, address)
    log = log or sys.stdout
    if follow:
        return _follow(client, job_id, log)
    log.write(client.get_job_logs(job_id))
    return 0


def status(job_id: str, address: str) -> dict[str, Any]:
    """A job's state: `job_id`, `status`, `exit_code` (None while it runs), `message`."""
    details = _details(_client(address), job_id, address)
    return {
        "job_id": job_id,
        "status": str(details.status.value),
        "exit_code": details.driver_exit_code,
        "message": details.message,
    }


def stop(job_id: str, address: str) -> dict[str, Any]:
    """Asks a job to write a checkpoint and end, waits for that, and returns its state."""
    client = _client(address)
    _details(client, job_id, address)
    client.stop_job(job_id)
    deadline = time.monotonic() + _GRACE_SECONDS + 10
    while (state := status(job_id, address))["status"] not in _ENDED and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return state


def absolute_with_notes(config: Config) -> Config:
    """Resolves the paths of a configuration against the current directory, and says which ones the cluster must see."""
    moved = resolve_paths(config)
    paths = {"run.dir": moved.run.dir, "data.dir": moved.data.dir, "data.input": moved.data.input}
    paths |= {f"data.sources.{name}.input": source.input for name, source in moved.data.sources.items()}
    for name, path in paths.items():
        if os.path.isabs(path):
            to_stderr(f"note: {name} is {path}; every node of the cluster must see this path")
    return moved


def stage(config: Config, folder: Path) -> None:
    """Fills a folder with what a job needs: the packages and `config.yaml`.

    Raises:
        ConfigError: The packages hold more than code.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(name, "not installed", "a job carries this package", "pip install moe-dist")
        source = Path(next(iter(spec.submodule_search_locations)))
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "runs"))
    (folder / "config.yaml").write_text(write_yaml(resolved(config)), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > _MOST_BYTES:
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        raise ConfigError(
            "submit",
            f"{size:,} bytes",
            f"a job carries at most {_MOST_BYTES:,} bytes of code",
            f"move {largest.relative_to(folder)} out of the package",
        )


def _client(address: str) -> Any:
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS, where set, would win over what was asked for
    offer_token(address)
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise _no_job_client(error) from None
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ConfigError(
            "--address",
            address,
            "this cluster asks for its token",
            TOKEN_FIX,
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        if "ray[default]" in str(error):
            raise _no_job_client(error) from None
        raise ConfigError(
            "--address",
            address,
            f"Ray's job server answers there ({str(error).splitlines()[0]})",
            "the head node's dashboard, like http://head:8265; is its port open, and is `ray start --head` running?",
        ) from None


def _no_job_client(error: Exception) -> ConfigError:
    return ConfigError("ray", error, "jobs need Ray's job client", 'pip install "ray[default]"')


def _details(client: Any, job_id: str, address: str) -> Any:
    try:
        return client.get_job_info(job_id)
    except RuntimeError:
        known = [job.submission_id for job in client.list_jobs() if job.submission_id]
        fix = f"known jobs: {', '.join(known[-5:])}" if known else "no job was submitted to this cluster"
        raise ConfigError("JOB_ID", job_id, f"the cluster at {address} knows the job", fix) from None


def _follow(client: Any, job_id: str, log: TextIO) -> int:
    """Copies the log until the job ends; a lost connection is waited out."""

    async def copy() -> None:
        async for lines in client.tail_job_logs(job_id):
            log.write(lines)
            log.flush()

    try:
        try:
            asyncio.run(copy())
        except (RuntimeError, OSError) as error:
            to_stderr(f"the log broke off ({error}); waiting for the job to end")
        while (details := client.get_job_info(job_id)).status.value not in _ENDED:
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        to_stderr(f"the job goes on; `moe-dist stop {job_id}` ends it")
        raise
    if details.status.value == "SUCCEEDED":
        return 0
    if details.message and not details.driver_exit_code:
        to_stderr(f"job {job_id}: {details.message}")
    return details.driver_exit_code or 1
