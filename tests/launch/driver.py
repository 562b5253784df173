"""Runs the stand-in rank through a launcher, in a process of its own that a test can send signals to.

Usage: python -m tests.launch.driver local|ray RUN_DIR. Prints the summary's status on standard output; exits like
the `moe-dist` command.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.local import run_local
from launch.progress import follow, open_display
from moe_dist.config import parse_config
from moe_dist.errors import MoeDistError

WORKER = "tests.launch.stand_in:run_worker"


def run(launcher: str, run_dir: str) -> str:
    """The status that the launcher's run ended with."""
    config = parse_config({"run": {"dir": run_dir}, "launch": {"workers": 2}})
    with open_display() as display:
        if launcher == "local":
            with follow(Path(run_dir), display):
                return run_local(config, Path(run_dir), 2, WORKER, display.message)["status"]
        from launch.generations import run_on_ray
        from launch.ray_cluster import connect

        with connect(config, "local") as cluster, follow(Path(run_dir), display):
            return run_on_ray(config, Path(run_dir), cluster, WORKER, display.message)["status"]


if __name__ == "__main__":
    try:
        print(run(*sys.argv[1:]))
    except MoeDistError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
