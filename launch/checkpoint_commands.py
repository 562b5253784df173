"""`moe-dist checkpoint`: what checkpoints there are, whether they are whole, and how two differ; on one CPU.

With `--json` the last line of standard output is one JSON object, and everything else goes to standard error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_dist.errors import CheckpointError, ConfigError, MoeDistError

if TYPE_CHECKING:
    from rich.console import Console

checkpoint_app = typer.Typer(
    no_args_is_help=True,
    help="List, prove, show, compare, cut anew and prune checkpoints, on one CPU and without the whole in memory.",
)

_ROWS_SHOWN = 40

Place = Annotated[
    str,
    typer.Argument(
        metavar="RUN|CHECKPOINT",
        help="A run's directory, its folder of checkpoints, or one checkpoint (step-...).",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]


def _one(letter: str) -> Any:
    text = "A checkpoint, or a run, of which the newest is taken."
    return typer.Argument(metavar=letter, help=text, show_default=False)


@checkpoint_app.command("list")
def list_checkpoints(place: Place, as_json: AsJson = False) -> None:
    """List checkpoints, newest first: step, size, parts, layout; manifests are proven, tensors are not read.

    Example: moe-dist checkpoint list runs/demo
    """
    from moe_dist.checkpoint.manifest import read_manifest

    rows = []
    for path in checkpoints_of(place):
        row: dict[str, Any] = {"path": str(path), "step": None, "bytes": None, "parts": None, "layout": None}
        try:
            manifest = read_manifest(path)
            row |= {"step": manifest.step, "bytes": manifest.num_bytes, "parts": len(manifest.parts)}
            row |= {"layout": manifest.layout, "problem": None}
        except CheckpointError as error:
            row["problem"] = f"{error.where}: {error.value}"
        rows.append(row)
    _print_rows(rows, _console(as_json))
    _answer(as_json, {"checkpoints": rows})


@checkpoint_app.command()
def verify(place: Place, as_json: AsJson = False) -> None:
    """Prove every byte of a checkpoint, or of all of a run. Exit code 1 where one is damaged, naming file and tensor.

    Example: moe-dist checkpoint verify runs/demo
    """
    from moe_dist.checkpoint.load import check_complete
    from moe_dist.checkpoint.manifest import read_manifest
    from moe_dist.checkpoint.read import damages

    console, rows = _console(as_json), []
    for path in checkpoints_of(place):
        problems: list[MoeDistError] = []
        try:
            manifest = read_manifest(path)
            problems += damages(path, manifest)
            check_complete(path, manifest)
        except MoeDistError as error:
            problems.append(error)
        console.print(f"{path}: {'whole' if not problems else 'DAMAGED'}")
        for found in problems[:_ROWS_SHOWN]:
            console.print(f"  {found.where}: found {found.value}; {found.rule}")
        told = [{"where": found.where, "value": str(found.value), "rule": found.rule} for found in problems]
        rows.append({"path": str(path), "whole": not problems, "problems": told})
    whole = all(row["whole"] for row in rows)
    _answer(as_json, {"whole": whole, "checkpoints": rows})
    raise typer.Exit(0 if whole else 1)


@checkpoint_app.command()
def show(place: Annotated[str, _one("CHECKPOINT")], as_json: AsJson = False) -> None:
    """Show what a checkpoint says of itself: step, parts, tensors by kind, experts, data cursor, schedule, config.

    Example: moe-dist checkpoint show runs/demo
    """
    from moe_dist.checkpoint.compare import summary_of
    from moe_dist.checkpoint.manifest import read_manifest

    path = checkpoints_of(place)[0]
    summary = {"path": str(path), **summary_of(read_manifest(path))}
    console = _console(as_json)
    for name in ("path", "format", "step", "save", "layout", "bytes", "tensors", "experts", "data", "state"):
        value = summary[name]
        console.print(f"{name:<8} {value if not isinstance(value, dict) else json.dumps(value)}")
    for part in summary["parts"]:
        console.print(f"part     {part['file']}  {part['bytes']:,} bytes  {part['tensors']} tensors")
    console.print(f"config   {json.dumps(summary['config'])}")
    _answer(as_json, summary)


@checkpoint_app.command()
def diff(a: Annotated[str, _one("A")], b: Annotated[str, _one("B")], as_json: AsJson = False) -> None:
    """Compare two checkpoints, whatever layouts wrote them. Exit code 0 if all tensors are equal to the bit, 1 if not.

    Tensors that differ are named, with the expert's global id and the largest absolute and relative difference.
    Configs are compared too, and decide nothing.

    Example: moe-dist checkpoint diff runs/one/checkpoints/step-00000100 runs/two
    """
    from moe_dist.checkpoint.compare import compare

    found = compare(checkpoints_of(a)[0], checkpoints_of(b)[0])
    console = _console(as_json)
    _print_differences(found, console)
    _answer(as_json, found)
    raise typer.Exit(0 if found["equal"] else 1)


@checkpoint_app.command()
def reshard(
    place: Annotated[str, _one("CHECKPOINT")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder that gets it, under its step.", show_default=False)],
    parts: Annotated[int, typer.Option(min=1, max=99_999, help="Files to cut it into.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint anew in another number of files; every byte that is read is proven.

    No run needs it, for every layout reads every number of files.

    Example: moe-dist checkpoint reshard runs/demo --out runs/copy/checkpoints --parts 8
    """
    from moe_dist.checkpoint.reshard import reshard as cut_anew

    path = checkpoints_of(place)[0]
    written = cut_anew(path, Path(out), parts)
    _console(as_json).print(f"{path} is in {parts} parts at {written}")
    _answer(as_json, {"from": str(path), "path": str(written), "parts": parts})


@checkpoint_app.command()
def prune(
    place: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory.", show_default=False)],
    keep: Annotated[int, typer.Option(min=1, help="Newest whole checkpoints that stay.", show_default=False)],
    keep_every: Annotated[int, typer.Option(min=0, help="Those of every so many steps stay too.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove all but the newest N checkpoints that prove whole, and those of every M-th step. Damaged ones stay.

    Example: moe-dist checkpoint prune runs/demo --keep 2 --keep-every 1000
    """
    from moe_dist.checkpoint import store

    kept, damaged, gone = _sorted_out(checkpoints_of(place), keep, keep_every)
    console = _console(as_json)
    for word, paths in (("keep", kept), ("damaged", damaged), ("would go" if dry_run else "removed", gone)):
        for path in paths:
            console.print(f"{word:<8} {path}")
    for path in gone if not dry_run else ():
        store.remove(path)
    lists = {"kept": kept, "damaged": damaged, "removed": gone}
    _answer(as_json, {**{name: [str(p) for p in paths] for name, paths in lists.items()}, "dry_run": dry_run})


def _sorted_out(paths: list[Path], keep: int, keep_every: int) -> tuple[list[Path], list[Path], list[Path]]:
    """Which stay, which are damaged, and which are older than `keep` that are proven whole."""
    from moe_dist.checkpoint import store
    from moe_dist.checkpoint.manifest import read_manifest
    from moe_dist.checkpoint.read import verify as prove

    kept: list[Path] = []
    damaged: list[Path] = []
    gone: list[Path] = []
    for path in paths:
        if len(kept) >= keep:
            stays = keep_every and store.step_of(path) % keep_every == 0
            (kept if stays else gone).append(path)
            continue
        try:
            prove(path, read_manifest(path))
            kept.append(path)
        except CheckpointError:
            damaged.append(path)
    return kept, damaged, gone


def checkpoints_of(place: str) -> list[Path]:
    """The checkpoint that is meant, or those of a run, newest first.

    Raises:
        ConfigError: There is none.
    """
    from moe_dist.checkpoint.manifest import MANIFEST
    from moe_dist.checkpoint.store import committed

    path = Path(place)
    if (path / MANIFEST).exists():
        return [path]
    found = committed(path / "checkpoints") or committed(path)
    if not found:
        raise ConfigError("RUN|CHECKPOINT", place, "a run with checkpoints, or a checkpoint", "moe-dist train first")
    return found


def _print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    for row in rows:
        if row["problem"]:
            console.print(f"{row['path']}  {row['problem']}")
        else:
            console.print(f"{row['path']}  {row['bytes']:,} bytes in {row['parts']} parts  {row['layout']}")


def _print_differences(found: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table("tensor", "expert", "numbers", "largest", "relative", box=None)
    for row in found["different"][:_ROWS_SHOWN]:
        expert = "" if row["expert"] is None else str(row["expert"])
        counts = f"{row['numbers']:,} of {row['of']:,}"
        table.add_row(row["name"], expert, counts, f"{row['largest']:.3g}", f"{row['largest_relative']:.3g}")
    if found["different"]:
        console.print(table)
    if len(found["different"]) > _ROWS_SHOWN:
        console.print(f"... {len(found['different']) - _ROWS_SHOWN} more: --json has all")
    for row in found["shapes"]:
        console.print(f"{row['name']}: {row['a']} against {row['b']}")
    for letter in "ab":
        names = found[f"only_in_{letter}"]
        if names:
            console.print(f"only in {letter.upper()}: {', '.join(names[:5])}" + (" ..." if len(names) > 5 else ""))
    if found["config"]:
        console.print(f"config: {'; '.join(found['config'][:_ROWS_SHOWN])}")
    verdict = "equal" if found["equal"] else "different"
    steps = " and ".join(map(str, found["steps"]))
    console.print(f"steps {steps}: {found['equal_tensors']} of {found['tensors']} tensors are equal: {verdict}")


def _console(as_json: bool) -> Console:
    from rich.console import Console

    console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, 160)
    return console


def _answer(as_json: bool, figures: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps(figures))
