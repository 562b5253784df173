"""The report at the end of a run: what was learnt, how the experts are loaded, how fast it was, and samples.

Keys of the summary that an interrupted run lacks are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from launch.progress import duration

_SAMPLES = 3
_EXPERT_COLUMNS = 10  # of a table that fits into 100 columns
_MOST_STEPS = 5  # that are listed by number
_MOST_EXPERTS = 64  # more than these are shown as least, median and most loaded


def print_report(summary: Mapping[str, Any], console: Console) -> None:
    """Prints a run's summary, readable at 100 columns without colours."""
    console.print()
    _print_heldout(summary, console)
    _print_experts(summary, console)
    for sample in summary.get("samples", [])[:_SAMPLES]:
        text = Text(sample["prompt"], style="bold")
        text.append(sample["text"].removeprefix(sample["prompt"]), style="not bold")
        console.print(Panel(text, title="sample", title_align="left"))
    for name, value in _facts(summary):
        console.print(Text.assemble((f"{name:<12}", "bold"), value), soft_wrap=True)


def _print_heldout(summary: Mapping[str, Any], console: Console) -> None:
    heldout = summary.get("heldout") or {}
    if not heldout:
        return
    console.print("held-out text", style="bold")
    table = Table()
    for name in ("", "loss", "bits per byte"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("before", "after"):
        if heldout.get(name):
            row = heldout[name]
            table.add_row(f"{name} training", _number(row.get("loss"), 4), _number(row.get("bits_per_byte"), 3))
    if heldout.get("bigram_bits_per_byte") is not None:
        table.add_row("token bigram counts", "", _number(heldout["bigram_bits_per_byte"], 3))
    console.print(table)


def _print_experts(summary: Mapping[str, Any], console: Console) -> None:
    layers = summary.get("expert_load") or []
    if not layers:
        return
    experts = max(len(layer["load"]) for layer in layers)
    console.print(f"load of each expert, % of a layer's routed tokens (even: {100 / experts:.1f})", style="bold")
    if experts > _MOST_EXPERTS:
        extremes = [(min(load), sorted(load)[len(load) // 2], max(load)) for load in (row["load"] for row in layers)]
        console.print(_expert_table(("least", "median", "most"), layers, extremes))
        return
    for first in range(0, experts, _EXPERT_COLUMNS):
        some = slice(first, first + _EXPERT_COLUMNS)
        names = [str(expert) for expert in range(experts)][some]
        console.print(_expert_table(names, layers, [layer["load"][some] for layer in layers]))


def _expert_table(
    names: Sequence[str], layers: Sequence[Mapping[str, Any]], shares: Sequence[Sequence[float]]
) -> Table:
    table = Table()
    for name in ("layer", "MaxVio", *names):
        table.add_column(name, justify="right")
    for layer, row in zip(layers, shares, strict=True):
        cells = [f"{100 * share:.1f}" for share in row]
        table.add_row(str(layer["layer"]), _number(layer.get("max_vio"), 2), *cells)
    return table


def _facts(summary: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """The lines below the tables."""
    facts = []
    parameters = summary.get("parameters") or {}
    if parameters:
        facts.append(("parameters", f"{parameters['total']:,} in all, {parameters['active']:,} active for a token"))
    if summary.get("steps") is not None:
        time = f" in {duration(summary['seconds'])}" if summary.get("seconds") is not None else ""
        facts.append(("steps", f"{summary['steps']}{time}"))
    if summary.get("effective_time"):
        facts.append(("effective", _effective(summary["effective_time"])))
    if summary.get("skipped_steps"):
        facts.append(("skipped", _skipped(summary["skipped_steps"])))
    if summary.get("left_out_rows"):
        rows, shards = sum(summary["left_out_rows"].values()), list(summary["left_out_rows"])
        facts.append(("left out", f"{rows} rows of {len(shards)} damaged shards: {', '.join(shards[:_MOST_STEPS])}"))
    if summary.get("tokens_per_second") is not None:
        mfu = f", MFU {summary['mfu']:.1%}" if summary.get("mfu") is not None else ""
        facts.append(("speed", f"{summary['tokens_per_second']:,.0f} tokens/s{mfu}"))
    if summary.get("drop_rate") is not None:
        facts.append(("dropped", f"{summary['drop_rate']:.2%} of routed tokens"))
    if summary.get("routing"):
        facts.append(("routing", _routing(summary["routing"])))
    workers = summary.get("workers") or []
    if workers:
        nodes = {worker.get("node") for worker in workers}
        facts.append(("ranks", f"{len(workers)} on {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"))
    if summary.get("checkpoint"):
        facts.append(("checkpoint", str(summary["checkpoint"])))
    if summary.get("run_dir"):
        facts.append(("run", str(summary["run_dir"])))
    return facts


def _effective(time: Mapping[str, Any]) -> str:
    """The share of the time that went into new steps, and the largest other parts of it."""
    others = sorted(((s, name) for name, s in time["seconds"].items() if name != "steps"), reverse=True)
    shown = ", ".join(f"{name.replace('_', ' ')} {duration(s)}" for s, name in others[:4] if s >= 0.5)
    again = f", {time['recomputed_steps']} steps made again" if time["recomputed_steps"] else ""
    attempts = f" and {time['attempts']} attempts" if time["attempts"] > 1 else ""
    rest = f"; {shown}" if shown else ""
    return f"{time['share']:.1%} of {duration(time['wall_seconds'])}{attempts} in new steps{again}{rest}"


def _skipped(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:_MOST_STEPS])) + (", ..." if len(steps) > _MOST_STEPS else "")
    return f"{len(steps)} steps whose loss or gradient was not finite: {shown}"


def _routing(routing: Mapping[str, float]) -> str:
    """Under 87 columns for any run."""
    dead = f"{routing['dead_experts']} of {routing['experts']} experts dead"
    entropy = f"entropy {routing['entropy_nats']:.2f} of {routing['even_entropy_nats']:.2f} nats"
    return f"{dead}, {entropy}, rank load {routing['rank_load']:.2f}, {routing['bytes_sent'] / 1e6:,.1f} MB sent a step"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
