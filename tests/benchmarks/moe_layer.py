"""One MoE feed-forward layer, forward and backward, against a dense one of equal active FLOPs and against peers.

    python -m tests.benchmarks.moe_layer [--quick] [--json] [--only NAME ...] [--tokens N]

All implementations get the same tokens and the same router weights, take turns within each round, and are compared by
the median of their rounds, so that whatever else the machine does falls on all alike. fp32, 2,048 tokens. All run in
one process under one setting of the allocator, that of training runs: where the two variables are unset, the program
starts itself again with them (`allocator.py`). Peak memory is measured apart from the clock, in a process for each
implementation (`peak_memory.py`); it is left out where the system cannot tell it.

A peer that is not installed is left out and named. Those that the dev extra does not bring (torchtitan, litgpt) come
with `pip install --no-deps -r tests/benchmarks/peers.txt`. `--json` ends with one object:

    {"rows": [{"shape", "share_of_dense": {name: share}, "milliseconds": {name: ms}, "peak_mb": {name: MB}}],
     "left_out": {name: reason}, "notes": {name: note}, "allocator": {variable: value}, "tokens", "threads"}
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tests.benchmarks import peak_memory, peers
from tests.benchmarks.allocator import restart_with_kept_blocks
from tests.benchmarks.options import parser_of
from tests.benchmarks.peers import IMPLEMENTATIONS, SHAPES, Shape


def one_pass(layer: nn.Module, x: Tensor, grad: Tensor) -> float:
    """Seconds of one forward and backward; gradients are made anew each time, as after `zero_grad`."""
    started = time.perf_counter()
    peers.forward_backward(layer, x, grad)
    seconds = time.perf_counter() - started
    x.grad = None
    layer.zero_grad(set_to_none=True)
    return seconds


def compare(shape: Shape, names: list[str], tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds by implementation, taking turns."""
    x, grad = peers.tokens_and_gradient(tokens, shape.width)
    layers = {name: peers.build(name, shape) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        first = turn % len(names)  # whoever comes after a large one finds other caches: each has every place in turn
        for name in names[first:] + names[:first]:
            taken = one_pass(layers[name], x, grad)
            if turn >= 2:
                seconds[name].append(taken)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(names: list[str], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each shape: clocks, then peak memory."""
    with peers.process_group_of_one() if "fairscale" in names else contextlib.nullcontext():
        clocks = [compare(shape, names, tokens, rounds) for shape in SHAPES]
    able = names if peak_memory.can_measure() else []
    peaks = {name: peak_memory.in_a_process_of_its_own(name, tokens) for name in able}
    rows = []
    for number, (shape, seconds) in enumerate(zip(SHAPES, clocks, strict=True)):
        rows.append(
            {
                "shape": str(shape),
                "share_of_dense": {name: seconds["dense"] / seconds[name] for name in names},
                "milliseconds": {name: 1000 * seconds[name] for name in names},
                "peak_mb": {name: peaks[name][number] for name in able},
            }
        )
    return rows


def tables(rows: list[dict[str, Any]], names: list[str], title: str) -> list[Table]:
    """One table of clocks and one of peaks, a line for each implementation."""
    shapes = [row["shape"] for row in rows]
    clocks = Table("share of dense", *shapes, title=title)
    peaks = Table("peak MB", *shapes, title="beyond parameters and input; gradients of parameters are in it")
    for name in names:
        cells = [(row["share_of_dense"][name], row["milliseconds"][name]) for row in rows]
        clocks.add_row(name, *(f"{share:.2f} ({ms:.0f} ms)" for share, ms in cells))
        peaks.add_row(name, *(f"{row['peak_mb'][name]:.1f}" if name in row["peak_mb"] else "-" for row in rows))
    return [clocks, peaks]


def memory_verdict(rows: list[dict[str, Any]]) -> str:
    """Where our peak is above that of the grouped products of `transformers`; empty where they were not measured."""
    ours, theirs = ([row["peak_mb"].get(name) for row in rows] for name in ("ours", "transformers grouped"))
    if None in ours or None in theirs:
        return ""
    above = [
        f"{row['shape']} ({mine:.1f} > {other:.1f} MB)"
        for row, mine, other in zip(rows, ours, theirs, strict=True)
        if mine > other
    ]
    return f"peak memory of ours is above that of transformers grouped at: {', '.join(above) or 'no shape'}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints two tables and, with --json, one object."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, help="these implementations, and the dense one")
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 64")
    options = parser.parse_args(arguments)
    allocator = restart_with_kept_blocks()
    wanted = [name for name in IMPLEMENTATIONS if not options.only or name in ("dense", *options.only)]
    left_out = peers.missing(wanted)
    names = [name for name in wanted if name not in left_out]
    rows = measure(names, options.tokens, 5 if options.quick else 15)
    threads = torch.get_num_threads()
    notes = {name: IMPLEMENTATIONS[name].note for name in names if IMPLEMENTATIONS[name].note}
    console = Console(file=sys.stderr if options.json else sys.stdout)
    title = f"forward + backward of {options.tokens} tokens, fp32, {threads} threads"
    lines = [memory_verdict(rows), *(f"{name}: {note}" for name, note in notes.items())]
    lines += [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    console.print(*tables(rows, names, title), *filter(None, lines), sep="\n")
    if options.json:
        result = {"rows": rows, "left_out": left_out, "notes": notes, "allocator": allocator}
        print(json.dumps(result | {"tokens": options.tokens, "threads": threads}))


if __name__ == "__main__":
    main()
