"""Builds in a process of its own, which a test can kill: python -m tests.data_pipeline.builder CONFIG WORKERS

CONFIG is the configuration as JSON. WORKERS is the number of Ray's, 0 for the plain path. Every report of progress is
a line of JSON on standard output, the folder of the build the last one.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from data_pipeline.build import build
from data_pipeline.once import Progress
from moe_dist.config import Config, parse_config


def tell(step: Progress) -> None:
    print(json.dumps(dataclasses.asdict(step)), flush=True)


def build_on(config: Config, workers: int) -> str:
    if not workers:
        return str(build(config, False, tell))
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        return str(build(config, True, tell))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(build_on(parse_config(json.loads(sys.argv[1])), int(sys.argv[2]))), flush=True)
