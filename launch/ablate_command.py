"""`moe-dist ablate`: small models of the same training compute on the same text, compared by held-out bits per byte.

With `--json` the last line of standard output is one JSON object, and everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_dist.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from launch.ablation import Cell

_LEAST_WIDTH = 100
ablate_app = typer.Typer()


@ablate_app.command()
def ablate(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...",
            help="YAML files, a variant each, and values that replace theirs in all of them, such as data.input=DIR.",
            show_default=False,
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, with seeds from the first config's on.")] = 2,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Variant whose compute all get, and that they are compared with; the first by default."
        ),
    ] = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Gets a run's directory for each cell.")] = "runs/ablations",
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Train variants for equal compute over several seeds, and compare their held-out bits per byte.

    Each variant makes as many steps as the reference's training FLOPs allow; how equal they are is in the table. What
    is finished is not trained again: stopped, the same command goes on. docs/ablations.md has results.

    Example: moe-dist ablate configs/ablations/*.yaml --seeds 3 --jobs 2 data.input=DIR
    """
    from rich.console import Console

    from launch.ablation import cells_of, plan_variants, results_of, run_cells

    overrides = [item for item in files if "=" in item]
    configs = [item for item in files if "=" not in item]
    if not configs:
        raise ConfigError("CONFIG", " ".join(files), "at least one YAML file", "configs/ablations/*.yaml")
    variants = plan_variants(configs, overrides, reference)
    cells = cells_of(variants, seeds, Path(out), jobs)
    with contextlib.redirect_stdout(sys.stderr):
        _train(cells, jobs, run_cells)
    rows = results_of(variants, cells)
    console = Console(file=sys.stderr if as_json else sys.stdout)
    console.width = max(console.width, _LEAST_WIDTH)
    print_rows(rows, console)
    if as_json:
        typer.echo(json.dumps({"reference": rows[0]["name"], "flops": rows[0]["flops"], "variants": rows}))


def _train(cells: list[Cell], jobs: int, run: Any) -> None:
    """Builds the data that all cells read, and trains those that are not finished."""
    from data_pipeline.build import build
    from launch.build_progress import BuildProgress
    from launch.progress import open_display

    with open_display() as display:
        if any(cell.summary is None for cell in cells):
            build(cells[0].config, False, BuildProgress(display))
        found = sum(cell.summary is not None for cell in cells)

        def told(cell: Cell, done: int) -> None:
            bits = (cell.summary or {})["heldout"]["after"]["bits_per_byte"]
            display.message(f"{cell.variant}, seed {cell.seed}: {bits:.4f} bits per byte")
            display.update("cells", done, len(cells), found=found)

        display.update("cells", found, len(cells), found=found)
        run(cells, jobs, told)


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the table, readable at 100 columns without colours."""
    from rich.table import Table

    console.print(f"held-out bits per byte, seeds {', '.join(map(str, rows[0]['seeds']))}", style="bold")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("variant", "params", "active", "steps", "compute", "mean", "range", "difference"):
        first = name == "variant"
        table.add_column(name, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row in rows:
        sizes = (f"{row['parameters'][kind] / 1e3:,.0f} k" for kind in ("total", "active"))
        bits, apart = row["bits_per_byte"], row["difference"]
        against = "" if row is rows[0] else f"{row['mean_difference']:+.3f} ({min(apart):+.3f}, {max(apart):+.3f})"
        figures = (f"{row['compute']:.2%}", f"{row['mean']:.3f}", f"{min(bits):.3f}-{max(bits):.3f}")
        table.add_row(row["name"], *sizes, f"{row['steps']:,}", *figures, against)
    console.print(table)
    console.print(
        f"compute: training FLOPs, of the {rows[0]['flops']:.3g} of {rows[0]['name']}; difference from it, seed by "
        "seed: mean (least, most); less is better",
        soft_wrap=True,
    )
