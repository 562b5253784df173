"""Time and peak memory of the cross-entropy, forward and backward, in chunks of tokens and the plain way.

    python -m tests.benchmarks.loss [--quick] [--json]

4,096 tokens of width 512 in fp32, 32,000 ids, 2 threads, and the same with bf16 autocast under --bf16. The plain way is
torch's: all scores at once, `F.cross_entropy`, autograd. All ways take turns in one process, each round in another
order; medians. `share_of_plain` is the median over rounds of a way's time over the plain one's in the same round.
`peak_megabytes` is resident memory beyond what was there before, in a process of its own for each way (peak_memory.py);
the gradients, 74 MB, are in it. `--json` ends with one object:
{"rows": [{way, chunk_tokens, milliseconds, share_of_plain, peak_megabytes}]}.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_dist.model.vocabulary import WholeVocabulary
from moe_dist.objectives.cross_entropy import summed_nats
from tests.benchmarks.allocator import GIVE_BACK, restart_with_kept_blocks
from tests.benchmarks.options import parser_of
from tests.benchmarks.peak_memory import can_measure, high_water

TOKENS, WIDTH, VOCABULARY, THREADS = 4096, 512, 32_000, 2
CHUNKS: tuple[int | None, ...] = (128, 256, 512, 1024, 2048, None)
WAYS = ("plain", *(f"chunks of {chunk}" if chunk else "one chunk" for chunk in CHUNKS))


def chunk_of(way: str) -> int | None:
    """Tokens of a chunk of the way of this name; None for all."""
    return CHUNKS[WAYS.index(way) - 1] if way != "plain" else None


def forward_backward(way: str, given: tuple[Tensor, Tensor, Tensor]) -> None:
    """One pass; gradients are left where they are."""
    hidden_TD, weight_VD, target_T = given
    if way == "plain":
        logits_TV = F.linear(hidden_TD, weight_VD)
        loss = F.cross_entropy(logits_TV.float(), target_T, reduction="none").sum()
        del logits_TV
    else:
        loss = summed_nats(hidden_TD, weight_VD, target_T, WholeVocabulary(), chunk_of(way))
    (loss / TOKENS).backward()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weights of usual size, and targets."""
    torch.set_num_threads(THREADS)
    draw = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(TOKENS, WIDTH, generator=draw).requires_grad_()
    weight_VD = (0.02 * torch.randn(VOCABULARY, WIDTH, generator=draw)).requires_grad_()
    return hidden_TD, weight_VD, torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)


def precision(bf16: bool) -> Any:
    """The context of a pass."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def forget(given: tuple[Tensor, Tensor, Tensor]) -> None:
    """Drops the gradients."""
    given[0].grad = given[1].grad = None


def peak_of(way: str, bf16: bool) -> float:
    """Megabytes of a pass, median of three after one; meant for a process born with `GIVE_BACK`."""
    given, peaks = inputs(), []
    for _ in range(4):
        with high_water() as found, precision(bf16):
            forward_backward(way, given)
        forget(given)
        peaks += found
    return statistics.median(peaks[1:])


def peak_in_a_process_of_its_own(way: str, bf16: bool) -> float | None:
    """The peak, or None where the system does not tell it."""
    if not can_measure():
        return None
    command = [sys.executable, "-m", "tests.benchmarks.loss", "--peak", way, *(["--bf16"] if bf16 else [])]
    done = subprocess.run(command, env=os.environ | GIVE_BACK, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def seconds_of(rounds: int, bf16: bool) -> dict[str, list[float]]:
    """Seconds of every round by way, the first round left out."""
    given = inputs()
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for place in range(len(WAYS)):
            way = WAYS[(turn + place) % len(WAYS)]
            started = time.perf_counter()
            with precision(bf16):
                forward_backward(way, given)
            taken[way].append(time.perf_counter() - started)
            forget(given)
    return {way: seconds[1:] for way, seconds in taken.items()}


def measure(rounds: int, bf16: bool) -> list[dict[str, Any]]:
    """A row for every way."""
    seconds = seconds_of(rounds, bf16)
    rows = []
    for way, own in seconds.items():
        share = statistics.median(mine / plain for mine, plain in zip(own, seconds["plain"], strict=True))
        figures = {"milliseconds": 1000 * statistics.median(own), "share_of_plain": share}
        peak = peak_in_a_process_of_its_own(way, bf16)
        rows.append({"way": way, "chunk_tokens": chunk_of(way), **figures, "peak_megabytes": peak})
    return rows


def main() -> None:
    """Measures, prints a table and, with --json, one object."""
    parser = parser_of(__doc__)
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--peak", choices=WAYS, help="print one peak in megabytes alone")
    options = parser.parse_args()
    if options.peak:
        print(peak_of(options.peak, options.bf16))
        return
    restart_with_kept_blocks()
    rows = measure(3 if options.quick else 9, options.bf16)
    table = Table(*rows[0], title=f"cross-entropy, {THREADS} threads")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(file=sys.stderr if options.json else sys.stdout).print(table)
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
