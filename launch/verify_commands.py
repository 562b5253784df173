"""`moe-dist verify`: proves for a config that every layout trains the model that one process trains.

With `--json` the last line of standard output is one JSON object, and everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from launch.exit_codes import ExitCode
from moe_dist.config import Config, load_config

WORKER = "launch.verify_run:run_cells"
_ROWS_SHOWN, _LEAST_WIDTH = 100, 190
_SHORT = {"expert_data": "copies", "expert_tensor": "cut", "balance_scope": "scope", "micro_batch": "micro"}
_SHORT |= {"first weights": "first", "gradient norm": "norm"}


def verify(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)],
    ranks: Annotated[
        int,
        typer.Option(
            "--ranks",
            min=1,
            help="Processes on this machine's CPU; layouts of N and of its divisors are proven.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Values that replace the file's, such as model.moe.top_k=4.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full/--quick",
            help="All layouts with all options, or so few that every pair of choices meets (minutes).",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Prove that every layout trains the same model: the config, shrunk, on many layouts against one process.

    Each cell is one training step in fp64: a layout (data, tensor, expert parallel), dispatcher, cut into
    micro-batches, capacity, balance scope, kind of recompute, parallel.data. Routing, loss terms, gradients, their
    norm and updated weights must equal those of one process to 1e-10. Exit code 0: all equal; 1: a cell differs, with
    the first tensor that does and what that suggests (docs/numerics.md); 2: wrong input. No data, GPU or Ray is needed.

    Example: moe-dist verify configs/demo.yaml --ranks 4
    """
    from moe_dist.verify.shrink import shrunk

    small, changes = shrunk(load_config(config, overrides or ()))
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as folder:
        run = small.run.model_copy(update={"dir": folder})
        summary = _prove(small.model_copy(update={"run": run}), ranks, full, Path(folder))
    summary |= {"ranks": ranks, "shrunk": {key: list(values) for key, values in changes.items()}}
    _print(summary, sys.stderr if as_json else sys.stdout)
    if as_json:
        typer.echo(json.dumps(summary))
    if summary["status"] == "interrupted":
        raise typer.Exit(ExitCode.INTERRUPTED)
    raise typer.Exit(ExitCode.DONE if summary["equal"] else ExitCode.FAILED)


def _prove(config: Config, ranks: int, full: bool, folder: Path) -> dict[str, Any]:
    """Judges the one-process model, makes its steps, and lets the ranks compare theirs with them."""
    from launch.local import run_local
    from launch.progress import follow, open_display
    from launch.verify_run import FULL_FILE
    from moe_dist.verify.lattice import cells_of
    from moe_dist.verify.proof import Proof

    if full:
        (folder / FULL_FILE).touch()
    with open_display() as display, contextlib.redirect_stdout(sys.stderr):
        proof = Proof(config, ranks, cells_of(config, ranks, full), folder)
        reference = proof.judge_layers(lambda done, total: display.update("reference", done, total))
        proof.write_oracles(lambda done, total: display.update("one process", done, total))
        display.message(f"{len(proof.cells)} cells on {ranks} ranks")
        with follow(folder, display):
            summary = run_local(config, folder, ranks, WORKER, say=display.message)
    equal = summary["equal"] and reference["first_difference"] is None
    return {**summary, "reference": reference, "equal": equal}


def _print(summary: dict[str, Any], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(file=stream, highlight=False, markup=False)
    console.width = max(console.width, _LEAST_WIDTH)
    cells = summary["cells"]
    changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in summary["shrunk"].items())
    console.print(f"shrunk: {changes or 'nothing'}\n")
    heads = [*cells[0]["degrees"], *cells[0]["options"], *cells[0]["stages"], "equal"]
    table = Table(*(Column(_SHORT.get(head, head), no_wrap=True) for head in heads), box=None, pad_edge=False)
    different = [cell for cell in cells if not cell["equal"]]
    for cell in (different or cells)[:_ROWS_SHOWN]:
        stages = (f"{error:.0e}" if error else "0" for error in cell["stages"].values())
        words = [*map(str, cell["degrees"].values()), *cell["options"].values()]
        table.add_row(*words, *stages, "yes" if cell["equal"] else "NO")
    console.print(table)
    left_out = len(cells) - min(len(different or cells), _ROWS_SHOWN)
    if left_out:
        console.print(f"... and {left_out} more{', equal ones too' if different else ''}: --json has all")
    reference = summary["reference"]
    judged = reference["first_difference"] or f"equal to {reference['worst']:.1e}"
    console.print(f"one process against moe/reference.py, {reference['options']} sets of options: {judged}")
    for failure in summary["failures"]:
        console.print(f"\n{failure['cells']} cells: first {failure['stage']}, {failure['group']}")
        console.print(f"  first      {failure['first_difference']}")
        for diagnosis in failure["diagnoses"][:3]:
            console.print(f"  diagnosis  {diagnosis}")
        console.print(f"  where      {failure['common']}")
        console.print(f"  layouts    {'; '.join(failure['layouts'])}")
    verdict = "all equal" if summary["equal"] else "DIFFERENT"
    console.print(f"{len(cells)} cells, {len(different)} different: {verdict}")
