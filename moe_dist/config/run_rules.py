"""Rules of how a run is started and recorded."""

from __future__ import annotations

import os
from collections.abc import Iterator

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError


def launch_rules(config: Config) -> Iterator[ConfigError]:
    workers = config.launch.workers
    if workers.min > workers.max:
        yield ConfigError(
            "launch.workers.min",
            workers.min,
            f"must not exceed launch.workers.max ({workers.max})",
            f"launch.workers.min={workers.max}",
        )


def ledger_rules(config: Config) -> Iterator[ConfigError]:
    for key, wanted in (
        ("routing_ledger", config.train.routing_ledger == "record"),
        ("routing_replay", config.train.routing_replay),
    ):
        if wanted and config.parallel.tensor > 1:
            yield ConfigError(
                "parallel.tensor",
                config.parallel.tensor,
                f"train.{key}: a ledger has whole rows of a rank, which the ranks of a tensor group share",
                "parallel.tensor=1",
            )
    train, own = config.train, os.path.abspath(config.run.dir)
    replay = None if train.routing_replay is None else os.path.abspath(train.routing_replay)
    if train.routing_ledger == "record" and replay in (own, os.path.join(own, "routing")):
        yield ConfigError(
            "train.routing_ledger",
            "record",
            f"a run cannot overwrite the ledger that it follows (train.routing_replay={train.routing_replay})",
            "train.routing_ledger=none, or another run.dir",
        )
