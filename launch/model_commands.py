"""`moe-dist model`: how large a model is, what a token costs, and what a rank must hold; nothing is trained.

JSON of `info`: {"parameters": {"total", "active"}, "sequence_length_tokens", "flops_per_token": {component: operations,
"total"}, "cache_bytes_per_token": {"whole", "window", "window_tokens"}, "ranks": [{"layout", "tensor", "expert",
"expert_tensor", "parameters", "weights", "gradients", "moments", "activations", "total"}]}; sizes in bytes, and
`activations` is an estimate.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moe_dist.config import Config
    from moe_dist.parallel.layout import Layout

model_app = typer.Typer(no_args_is_help=True, help="How large a model is, what it costs and what a rank must hold.")

_LAYOUTS_SHOWN = 12


@model_app.command("info")
def info(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Also show what a rank holds in every layout of so many.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Show parameters, operations of a token, cache and memory by layout; the model is never made.

    Example: moe-dist model info configs/models/deepseek-v3.yaml --ranks 64
    """
    from moe_dist.config import load_config

    found = describe(load_config(config, overrides or ()), ranks)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _show(found)


def describe(config: Config, ranks: int | None) -> dict[str, Any]:
    """The figures of a model as plain values."""
    from dataclasses import asdict

    from moe_dist.model.flops import cached_numbers_per_token, count_parameters, flops_by_component
    from moe_dist.parallel.layout import layout_of, legal_layouts
    from moe_dist.parallel.memory import memory_of_rank, sizes_of

    counts, length = count_parameters(config.model), config.data.sequence_length_tokens
    flops = flops_by_component(config.model, length)
    whole, near = (2 * numbers for numbers in cached_numbers_per_token(config.model))
    window, layouts = config.model.attention.window_tokens, []
    if ranks is not None:
        asked = layout_of(config, ranks, config.parallel.ranks_per_node)
        others = legal_layouts(config, ranks, config.parallel.ranks_per_node)
        layouts = [asked, *(other for other in others if other != asked)]
    sizes = sizes_of(config.model) if layouts else []
    rows = [(layout, memory_of_rank(config, layout, sizes)) for layout in layouts]
    return {
        "parameters": {"total": counts.total, "active": counts.active},
        "sequence_length_tokens": length,
        "flops_per_token": {**flops, "total": sum(flops.values())},
        "cache_bytes_per_token": {"whole": whole, "window": near, "window_tokens": window},
        "ranks": [{**_degrees(layout), **asdict(memory), "total": memory.total} for layout, memory in rows],
    }


def _degrees(layout: Layout) -> dict[str, Any]:
    degrees = {"tensor": layout.tensor, "expert": layout.expert, "expert_tensor": layout.expert_tensor}
    return {"layout": str(layout), **degrees}


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    counts, flops = found["parameters"], found["flops_per_token"]
    console.print(f"parameters  {counts['total']:,} in all, {counts['active']:,} active for a token")
    table = Table(
        "operations of a token", "GFLOP", "share", title=f"rows of {found['sequence_length_tokens']:,} tokens"
    )
    for name, count in flops.items():
        table.add_row(name, f"{count / 1e9:,.3f}", f"{count / flops['total']:.1%}")
    console.print(table)
    cache = found["cache_bytes_per_token"]
    behind = f", and {cache['window']:,} of each of the last {cache['window_tokens']:,}" if cache["window"] else ""
    console.print(f"cache       {cache['whole']:,} bytes of every token in 16 bit{behind}")
    if not found["ranks"]:
        return
    names = ("weights", "gradients", "moments", "activations", "total")
    table = Table("tensor", "expert", "expert-tensor", "parameters", *names, title="GiB of the rank that holds most")
    first, *others = found["ranks"]
    for row in [first, *sorted(others, key=lambda row: row["total"])][:_LAYOUTS_SHOWN]:
        sizes = (f"{row[name] / 2**30:,.1f}" for name in names)
        degrees = (str(row[name]) for name in ("tensor", "expert", "expert_tensor"))
        table.add_row(*degrees, f"{row['parameters'] / 1e9:,.2f} G", *sizes)
    console.print(table, "the layout asked for first, then from the smallest on; activations are an estimate")
    if len(found["ranks"]) > _LAYOUTS_SHOWN:
        console.print(f"and {len(found['ranks']) - _LAYOUTS_SHOWN} layouts more: --json shows all")
