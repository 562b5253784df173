"""The dispatchers of expert parallelism on gloo ranks: bytes on the wire, and time of forward and backward.

    python -m tests.benchmarks.dispatch [--quick] [--json]

Every rank holds 2,048 tokens of width 512 (fp32) that choose k of 64 experts uniformly at random. Each dispatcher is
timed twice: with experts that return their input, so that what is timed is the exchange and its bookkeeping alone, and
with real ones (SwiGLU of width 128), beside which an exchange can be hidden. Two-level has nodes of half the ranks. All
dispatchers get the same tokens and take turns within each round, which ends when the slowest rank is done; the median
over rounds is shown. Bytes are those which a forward pass really handed to collectives for other ranks, summed over
ranks; `bytes_formula` is the closed formula. Ends with 1 where they differ, or where the de-duplicated dispatcher sends
more than half of the plain bytes at k 8 on 4 ranks. `--json` ends with one object:
{"rows": [{ranks, k, dispatch, bytes, bytes_between_nodes, bytes_formula, share_of_plain_bytes, milliseconds,
milliseconds_with_experts}]}.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_dist.config import ModelConfig, MoEConfig, ParallelConfig
from moe_dist.moe.dispatch import ApplyExperts, Dispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.plan import RoutingPlan, make_plan
from moe_dist.parallel.expert import build_dispatcher
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Groups, build_mesh
from moe_dist.parallel.wire import expected_share_of_plain
from tests.benchmarks.options import parser_of
from tests.support.gang import run_gang
from tests.support.wire import Wire

TOKENS, WIDTH, EXPERTS = 2048, 512, 64
RANKS, CHOICES = (2, 4), (2, 8)
EXPERT_WIDTH = 128
DISPATCHERS = {
    "all_to_all": ParallelConfig(),
    "all_gather": ParallelConfig(dispatch="all_gather"),
    "deduplicated": ParallelConfig(dispatch="deduplicated"),
    "two_level": ParallelConfig(dispatch="two_level"),
    "all_to_all, 2 parts": ParallelConfig(overlap_chunks=2),
    "deduplicated, 2 parts": ParallelConfig(dispatch="deduplicated", overlap_chunks=2),
}
MOST_SHARE = 0.50  # of the plain bytes, de-duplicated, at k 8 on 4 ranks
WARM_UP = 2


def inputs_of(rank: int, top_k: int) -> tuple[Tensor, Tensor, RoutingPlan]:
    """Tokens [T, D], gates [T, K] and the plan of one rank."""
    draw = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(TOKENS, WIDTH, generator=draw)
    gate_TK = torch.rand(TOKENS, top_k, generator=draw)
    expert_TK = torch.rand(TOKENS, EXPERTS, generator=draw).topk(top_k).indices
    return x_TD, gate_TK, make_plan(expert_TK, gate_TK, None, (1, TOKENS, EXPERTS), None)


def one_pass(dispatcher: Dispatcher, experts: ApplyExperts, given: tuple[Tensor, Tensor, RoutingPlan]) -> float:
    """Seconds of forward and backward, from when all ranks begin until all are done."""
    x_TD, gate_TK, plan = given
    leaves = x_TD.detach().requires_grad_(), gate_TK.detach().requires_grad_()
    dist.barrier()
    started = time.perf_counter()
    out_TD, _ = dispatcher.run(*leaves, plan, experts)
    out_TD.backward(x_TD)
    dist.barrier()
    return time.perf_counter() - started


def returned(rows_RD: Tensor, counts_L: list[int]) -> Tensor:
    """Experts that return their input."""
    return rows_RD


def measure(rank: int, ranks: int, rounds: int) -> list[dict[str, Any]]:
    """What one rank sent and how long each dispatcher took, for every k."""
    mesh = build_mesh(Layout(ranks, ranks, EXPERTS, ranks // 2), Groups(600))
    moe = MoEConfig(num_experts=EXPERTS, expert_width=EXPERT_WIDTH)
    model = ModelConfig(width=WIDTH, moe=moe)
    dispatchers = {name: build_dispatcher(mesh, parallel, model) for name, parallel in DISPATCHERS.items()}
    real = Experts(WIDTH, moe, mesh.experts_here)
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    rows = []
    for top_k in CHOICES:
        given = inputs_of(rank, top_k)
        seconds: dict[Any, list[float]] = {(name, kind): [] for name in dispatchers for kind in (returned, real)}
        for _ in range(WARM_UP + rounds):
            for (name, kind), times in seconds.items():
                times.append(one_pass(dispatchers[name], kind, given))
        median = {key: 1000 * statistics.median(taken[WARM_UP:]) for key, taken in seconds.items()}
        for name, dispatcher in dispatchers.items():
            with Wire().tapped() as wire:
                _, journey = dispatcher.run(*given, returned)
            between = wire.to_other_nodes(ranks // 2)
            row = {"ranks": ranks, "k": top_k, "dispatch": name, "bytes": wire.taken(), "bytes_between_nodes": between}
            times = {"milliseconds": median[name, returned], "milliseconds_with_experts": median[name, real]}
            rows.append(row | {"bytes_formula": journey.bytes_sent} | times)
    return rows


def over_ranks(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Bytes summed over ranks, with their share of the plain dispatcher's."""
    rows = []
    for parts in zip(*found, strict=True):
        sums = {key: sum(part[key] for part in parts) for key in ("bytes", "bytes_between_nodes", "bytes_formula")}
        slowest = {key: max(part[key] for part in parts) for key in parts[0] if key.startswith("milliseconds")}
        rows.append(parts[0] | sums | slowest)
    plain = {(r["ranks"], r["k"]): r["bytes"] for r in rows if r["dispatch"] == "all_to_all"}
    return [row | {"share_of_plain_bytes": row["bytes"] / plain[row["ranks"], row["k"]]} for row in rows]


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows for a person."""
    table = Table(title=f"forward + backward of {TOKENS} tokens a rank, D {WIDTH}, {EXPERTS} experts, fp32, gloo")
    for title in (
        "ranks",
        "k",
        "dispatch",
        "MB forward",
        "between nodes",
        "formula",
        "share of plain",
        "ms exchange",
        "ms with experts",
    ):
        table.add_column(title, justify="left" if title == "dispatch" else "right", no_wrap=title == "dispatch")
    for row in rows:
        same = "equal" if row["bytes"] == row["bytes_formula"] else str(row["bytes_formula"])
        share = f"{row['share_of_plain_bytes']:.3f}"
        times = f"{row['milliseconds']:.0f}", f"{row['milliseconds_with_experts']:.0f}"
        megabytes = [f"{row[key] / 1e6:.2f}" for key in ("bytes", "bytes_between_nodes")]
        case = (str(row["ranks"]), str(row["k"]), row["dispatch"])
        table.add_row(*case, *megabytes, same, share, *times)
    return table


def main() -> int:
    """Measures, prints a table and, with --json, one object."""
    options = parser_of(__doc__).parse_args()
    console = Console(file=sys.stderr if options.json else sys.stdout)
    rows = []
    for ranks in RANKS:
        with console.status(f"{ranks} ranks"):
            found = run_gang(measure, ranks, ranks, 5 if options.quick else 25, timeout_seconds=600)
        rows += over_ranks(found)
    console.print(table_of(rows))
    free, distinct = expected_share_of_plain(8, 4), expected_share_of_plain(8, 4, EXPERTS)
    console.print(f"k 8 on 4 ranks, de-duplicated: {free:.3f} of the plain rows to expect, {distinct:.3f} as the")
    console.print(f"experts of a token are distinct; choices and gates come on top. At most {MOST_SHARE} of the bytes.")
    if options.json:
        print(json.dumps({"rows": rows}))
    return 0 if holds(rows) else 1


def holds(rows: list[dict[str, Any]]) -> bool:
    """Whether bytes equal their formula and de-duplication saves what it must."""
    exact = all(row["bytes"] == row["bytes_formula"] for row in rows)
    asked = [r for r in rows if (r["ranks"], r["k"], r["dispatch"]) == (4, 8, "deduplicated")]
    return exact and all(row["share_of_plain_bytes"] <= MOST_SHARE for row in asked)


if __name__ == "__main__":
    sys.exit(main())
