"""What recompute saves and costs: peak memory and time of a forward and backward pass of the demo's model.

    python -m tests.benchmarks.recompute [--quick] [--json]

One rank, one micro-batch of the demo (8 rows of 256 tokens) at its first weights, and the same with four times the
blocks, where the logits are less of the whole. `peak_megabytes` is resident memory beyond what was there before the
pass, in a process of its own for each kind (see peak_memory.py); gradients are in it. `milliseconds` is the median of
passes in one process, in which the kinds take turns. `--json` ends with one object:
{"rows": [{layers, recompute, peak_megabytes, milliseconds}]}.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_dist.config import Config, load_config
from moe_dist.moe.randomness import Draw
from moe_dist.objectives.language_modelling import language_modelling_sums
from moe_dist.objectives.micro_batch import MicroBatch
from moe_dist.train.step import Trainee
from tests.benchmarks.allocator import GIVE_BACK, restart_with_kept_blocks
from tests.benchmarks.options import parser_of
from tests.benchmarks.peak_memory import can_measure, high_water
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee

KINDS = ("none", "selective", "full")
LAYERS = (4, 16)
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def config_of(layers: int, kind: str) -> Config:
    """The demo's model with so many blocks."""
    return load_config(DEMO, [f"model.num_layers={layers}", f"train.recompute={kind}"])


def forward_backward(trainee: Trainee) -> None:
    """One micro-batch; gradients are left where they are."""
    config = trainee.config
    shape = (config.train.micro_batch_sequences, config.data.sequence_length_tokens + 1)
    rows = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    sums = language_modelling_sums(trainee.model, MicroBatch.of(rows), Draw(0, 0, 0))
    (sums.total(config.model.moe) / rows[:, 1:].numel()).backward()


def peak_of(layers: int, kind: str) -> float:
    """Megabytes of a pass, median of three after two; meant for a process born with `GIVE_BACK`."""
    with one_rank():
        trainee, peaks = parallel_trainee(config_of(layers, kind), 1), []
        for _ in range(5):
            with high_water() as found:
                forward_backward(trainee)
            trainee.model.zero_grad(set_to_none=True)
            peaks += found
    return statistics.median(peaks[2:])


def peak_in_a_process_of_its_own(layers: int, kind: str) -> float | None:
    """The peak, or None where the system does not tell it."""
    if not can_measure():
        return None
    command = [sys.executable, "-m", "tests.benchmarks.recompute", "--peak", str(layers), kind]
    done = subprocess.run(command, env=os.environ | GIVE_BACK, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def seconds_of(layers: int, rounds: int) -> dict[str, float]:
    """Median seconds of a pass by kind, the first round left out."""
    trainees = {kind: parallel_trainee(config_of(layers, kind), 1) for kind in KINDS}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        for place in range(len(KINDS)):
            kind = KINDS[(turn + place) % len(KINDS)]
            started = time.perf_counter()
            forward_backward(trainees[kind])
            taken[kind].append(time.perf_counter() - started)
            trainees[kind].model.zero_grad(set_to_none=True)
    return {kind: statistics.median(seconds[1:]) for kind, seconds in taken.items()}


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for every depth and kind."""
    with one_rank():
        seconds = {layers: seconds_of(layers, rounds) for layers in LAYERS}
    rows = []
    for layers in LAYERS:
        for kind in KINDS:
            peak = peak_in_a_process_of_its_own(layers, kind)
            figures = {"peak_megabytes": peak, "milliseconds": 1000 * seconds[layers][kind]}
            rows.append({"layers": layers, "recompute": kind, **figures})
    return rows


def main() -> None:
    """Measures, prints a table and, with --json, one object."""
    parser = parser_of(__doc__)
    parser.add_argument("--peak", nargs=2, metavar=("LAYERS", "KIND"), help="print one peak in megabytes alone")
    options = parser.parse_args()
    if options.peak:
        print(peak_of(int(options.peak[0]), options.peak[1]))
        return
    restart_with_kept_blocks()
    rows = measure(3 if options.quick else 9)
    table = Table(*rows[0], title=f"recompute, {torch.get_num_threads()} threads")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(file=sys.stderr if options.json else sys.stdout).print(table)
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
