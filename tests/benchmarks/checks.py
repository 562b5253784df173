"""What the checks of `train.checks` cost: a step of the demo's model, and a comparison of its weights.

    python -m tests.benchmarks.checks [--quick] [--json]

One process and its threads, one optimizer update of the demo (16 rows of 256 tokens in two micro-batches, AdamW). Steps
without and with `light` take turns, the first place changing; `share` is the median over pairs of what `light` adds, in
parts of a step, beside its quartiles, and `own_milliseconds` the time inside its functions alone, by the clock, which
the difference of two steps is too coarse for. `weights_milliseconds` is one comparison of `full`, which a run makes
every `train.checks_every_steps` steps. `--json` ends with one object: {"rows": [{off_milliseconds, light_milliseconds,
share, share_quartiles, own_milliseconds, weights_milliseconds}]}.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_dist.config import Config, load_config
from moe_dist.train.checks import Witness, check_weights
from moe_dist.train.step import Trainee, train_step
from tests.benchmarks.allocator import restart_with_kept_blocks
from tests.benchmarks.options import parser_of
from tests.benchmarks.train_step import clocked
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def rows_of(config: Config, step: int) -> torch.Tensor:
    """Random token rows of a global batch."""
    shape = (config.train.global_batch_sequences, config.data.sequence_length_tokens + 1)
    return torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(step))


def seconds_of(action: Callable[[], Any]) -> float:
    """How long an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def own_seconds(trainee: Trainee, rounds: int) -> float:
    """What a step spends inside the functions of its checks; `reduce` of the witness less that of the gradients."""
    spent: dict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        for name in ("__init__", "watch", "reduce", "judge", "_gates_reached"):
            stack.enter_context(clocked(Witness, name, "checks", spent))
        stack.enter_context(clocked(trainee.gradients, "reduce", "sums", spent))
        for turn in range(rounds):
            train_step(trainee, rows_of(trainee.config, turn), turn)
    return (spent["checks"] - spent["sums"]) / rounds


def measure(rounds: int) -> dict[str, Any]:
    """Medians over the rounds, after two that do not count."""
    kinds = ("off", "light", "full")
    trainees = {kind: parallel_trainee(load_config(DEMO, [f"train.checks={kind}"]), 1, "adamw") for kind in kinds}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 2):
        rows = rows_of(trainees["off"].config, turn)
        for kind in ("off", "light") if turn % 2 else ("light", "off"):
            taken[kind].append(seconds_of(lambda: train_step(trainees[kind], rows, turn)))  # noqa: B023 - called at once
        taken["full"].append(seconds_of(lambda: check_weights(trainees["full"], turn, now=True)))  # noqa: B023
    off, light, weights = (taken[kind][2:] for kind in kinds)
    shares = [(with_checks - without) / without for with_checks, without in zip(light, off, strict=True)]
    return {
        "off_milliseconds": 1000 * statistics.median(off),
        "light_milliseconds": 1000 * statistics.median(light),
        "share": statistics.median(shares),
        "share_quartiles": [statistics.quantiles(shares)[place] for place in (0, 2)],
        "own_milliseconds": 1000 * own_seconds(trainees["light"], rounds // 4),
        "weights_milliseconds": 1000 * statistics.median(weights),
    }


def main() -> None:
    """Measures, prints a table and, with --json, one object."""
    options = parser_of(__doc__).parse_args()
    restart_with_kept_blocks()
    with one_rank():
        row = measure(8 if options.quick else 40)
    table = Table(*row, title=f"train.checks on the demo's model, {torch.get_num_threads()} threads")
    table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(file=sys.stderr if options.json else sys.stdout).print(table)
    if options.json:
        print(json.dumps({"rows": [row]}))


if __name__ == "__main__":
    main()
