"""How far the cheaper balance terms are from the exact one, and what the exact one costs.

    python -m tests.benchmarks.balance [--quick] [--json]

Two gloo ranks of one thread, the demo's model at its first weights, 16 rows of 256 tokens in micro-batches of 2. Rows
are either alike (all draw from one skewed distribution of tokens) or sorted (every two neighbouring rows share a
distribution of their own, so that every micro-batch is skewed in its own way). `value` is the term's relative distance
from that of the whole global batch; `gradient` that of the routers' gradient from the term alone, 2-norms;
`step_milliseconds` a whole training step, kinds taking turns, median. `--json` ends with one object:
{"rows": [{rows, kind, value, gradient, step_milliseconds}]}.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_dist.config import Config, load_config
from moe_dist.objectives.language_modelling import LossSums
from moe_dist.train.step import train_step
from tests.benchmarks.options import parser_of
from tests.support.gang import run_gang
from tests.support.parallel_step import candidate_step, parallel_trainee

RANKS, ROWS, LENGTH, MICRO = 2, 16, 256, 2
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
KINDS = {
    "exact": {"balance_scope": "global", "global_balance": "exact"},
    "running": {"balance_scope": "global", "global_balance": "running"},
    "micro_step": {"balance_scope": "global", "global_balance": "micro_step"},
    "micro_batch": {"balance_scope": "micro_batch"},
    "sequence": {"balance_scope": "sequence"},
}


def config_of(kind: str) -> Config:
    """The demo's model, accumulating, with one kind of balance term."""
    overrides = [f"model.moe.{key}={value}" for key, value in KINDS[kind].items()]
    overrides += [f"train.global_batch_sequences={ROWS}", f"train.micro_batch_sequences={MICRO}"]
    overrides += [f"data.sequence_length_tokens={LENGTH}", "model.moe.capacity_factor=null", "train.clip_norm=null"]
    return load_config(DEMO, overrides)


def rows_of(order: str, vocabulary: int) -> Tensor:
    """Token rows, int64 [ROWS, LENGTH + 1]; Zipf's law over a permutation of the vocabulary, one or one a pair."""
    draw = torch.Generator().manual_seed(0)
    weight = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    drawn = torch.multinomial(weight.expand(ROWS, -1), LENGTH + 1, replacement=True, generator=draw)
    shuffles = [torch.randperm(vocabulary, generator=draw) for _ in range(ROWS // MICRO)]
    return torch.stack([shuffles[row // MICRO if order == "sorted" else 0][ids] for row, ids in enumerate(drawn)])


def balance_alone(self: LossSums, config: Any) -> Tensor:
    """The loss in which only the balance term has a gradient."""
    return config.balance_loss * self.balance


def gradient_of(rank: int, kind: str, shares: list[Tensor]) -> dict[str, Any]:
    """The term, and its gradient of all routers in one vector."""
    with mock.patch.object(LossSums, "total", balance_alone):
        proof = candidate_step(rank, config_of(kind), RANKS, shares)
    routers = [grad.flatten() for name, grad in sorted(proof.gradients.items()) if "router" in name]
    return {"value": proof.scalars["balance"], "gradient": torch.cat(routers)}


def seconds_by_kind(rank: int, shares: list[Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of a step until the slower rank is done."""
    trainees = {kind: parallel_trainee(config_of(kind), RANKS, "adamw") for kind in KINDS}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        for kind, trainee in trainees.items():
            dist.barrier()
            started = time.perf_counter()
            train_step(trainee, shares[rank], turn)
            dist.barrier()
            taken[kind].append(time.perf_counter() - started)
    return {kind: statistics.median(seconds[1:]) for kind, seconds in taken.items()}


def of_rank(rank: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each order of rows and kind of term; alike on all ranks."""
    torch.set_num_threads(1)
    rows = []
    for order in ("alike", "sorted"):
        shares = list(rows_of(order, config_of("exact").model.vocab_size).chunk(RANKS))
        found = {kind: gradient_of(rank, kind, shares) for kind in KINDS}
        seconds = seconds_by_kind(rank, shares, rounds)
        exact = found["exact"]
        for kind, of_kind in found.items():
            away = (of_kind["gradient"] - exact["gradient"]).norm() / exact["gradient"].norm()
            figures = {"value": of_kind["value"] / exact["value"] - 1, "gradient": float(away)}
            rows.append({"rows": order, "kind": kind, **figures, "step_milliseconds": 1000 * seconds[kind]})
    return rows


def main() -> None:
    """Measures, prints a table and, with --json, one object."""
    options = parser_of(__doc__).parse_args()
    rows = run_gang(of_rank, RANKS, 3 if options.quick else 9, timeout_seconds=900)[0]
    table = Table(*rows[0], title=f"balance terms, {RANKS} ranks, micro-batches of {MICRO} rows")
    for row in rows:
        table.add_row(row["rows"], row["kind"], *(f"{row[k]:.3g}" for k in ("value", "gradient", "step_milliseconds")))
    Console(file=sys.stderr if options.json else sys.stdout).print(table)
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
