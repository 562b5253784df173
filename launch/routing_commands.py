"""`moe-dist routing`: records which experts every token went to, compares two such ledgers, and follows one again.

With `--json` the last line of standard output is one JSON object, and everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.exit_codes import ExitCode
from moe_dist.config import Config, load_config
from moe_dist.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from moe_dist.train.routing_ledger import Page

routing_app = typer.Typer(
    no_args_is_help=True, help="Record which experts every token goes to, compare two recordings, follow one again."
)

_WORKER = "launch.routing_run:run_steps"
_ROWS_SHOWN = 40

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Values that replace the file's, such as seed=1.", show_default=False
    ),
]
Ranks = Annotated[int, typer.Option("--ranks", min=1, help="Processes on this machine's CPU.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]


def _ledger(letter: str) -> Any:
    text = "A recording: --out of `routing record`, or the directory of a run with train.routing_ledger=record."
    return typer.Argument(metavar=letter, help=text, show_default=False)


@routing_app.command()
def record(
    config: ConfigPath,
    ranks: Ranks,
    steps: Annotated[int, typer.Option(min=1, help="Updates to make: train.steps.", show_default=False)],
    out: Annotated[str, typer.Option(metavar="DIR", help="A new or empty directory.", show_default=False)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a few steps as N gloo processes and record the routing of every token; nothing else is kept.

    Example: moe-dist routing record configs/demo.yaml --ranks 4 --steps 3 --out runs/routing-4
    """
    keys = [*(overrides or ()), f"train.steps={steps}", "train.routing_ledger=record"]
    checked = load_config(config, [*keys, f"run.dir={json.dumps(out)}"])
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ConfigError("--out", out, "a recording begins in a new or empty directory", "another --out")
    Path(out).mkdir(parents=True, exist_ok=True)
    summary = _run(checked, ranks)
    _answer(as_json, summary | {"ledger": out}, f"{len(summary['losses'])} steps are recorded in {out}")
    _exit_if_interrupted(summary)


@routing_app.command()
def diff(a: Annotated[str, _ledger("A")], b: Annotated[str, _ledger("B")], as_json: AsJson = False) -> None:
    """Compare two recordings: exit code 0 if every token goes to the same experts and keeps them, 1 if not.

    `experts` and `drops` count tokens; `gate` is the largest difference of a gate weight where experts agree, and is no
    difference of routing. The first token that differs is named: step, layer, position in the global batch.

    Example: moe-dist routing diff runs/routing-1 runs/routing-4
    """
    from moe_dist.train.routing_ledger import find_ledger, recorded_steps

    folders = find_ledger(a), find_ledger(b)
    steps = [recorded_steps(folder) for folder in folders]
    shared = sorted(steps[0].keys() & steps[1].keys())
    if not shared:
        raise LedgerError(b, f"steps {_span(steps[1])}", f"{a} has steps {_span(steps[0])}", "record common steps")
    rows: list[dict[str, Any]] = []
    first = None
    for step in shared:
        found, where = _compare_step(folders, step)
        rows += found
        first = first or where
    only = sorted(steps[0].keys() ^ steps[1].keys())
    equal = first is None and not only and not any(row["tokens_differ"] for row in rows)
    _print_diff(rows, first, only, equal, sys.stderr if as_json else sys.stdout)
    _answer(as_json, {"equal": equal, "rows": rows, "first": first, "only_in_one": only}, "")
    raise typer.Exit(ExitCode.DONE if equal else ExitCode.FAILED)


@routing_app.command()
def replay(
    ledger: Annotated[str, _ledger("LEDGER")],
    config: ConfigPath,
    ranks: Ranks,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the recorded steps again with the recorded choices, and tell what choosing freely would have changed.

    `drift` is the fraction of tokens that would now choose other experts than those they are sent to: 0 in a run of the
    same weights. Drops are followed too and count for nothing here, so expert_choice has no drift.

    Example: moe-dist routing replay runs/routing-1 configs/demo.yaml --ranks 2
    """
    from moe_dist.train.routing_ledger import SHAPE, check_header, find_ledger, read_page, recorded_steps, run_header

    folder = find_ledger(ledger)
    steps = list(recorded_steps(folder))
    if steps != list(range(1, len(steps) + 1)):
        fix = "train with train.routing_replay in the run's own directory, which continues from a checkpoint"
        raise LedgerError(str(folder), f"steps {_span(steps)}", "a replay begins at step 1 and leaves out none", fix)
    header = read_page(folder, 1).header
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as run_dir:
        keys = [*(overrides or ()), f"train.routing_replay={json.dumps(str(folder))}", "train.routing_ledger=none"]
        # The learning rate of a step depends on the number of steps that were planned.
        checked = load_config(config, [*keys, f"train.steps={header['train_steps']}", f"run.dir={json.dumps(run_dir)}"])
        blocks = checked.model.moe_blocks
        batch = (checked.train.global_batch_sequences, checked.data.sequence_length_tokens)
        check_header(str(folder), header, run_header(checked, blocks, batch), (*SHAPE, "seed"))
        summary = _run(checked, ranks)
    _print_drift(checked, summary, sys.stderr if as_json else sys.stdout)
    _answer(as_json, summary, "")
    _exit_if_interrupted(summary)


def _compare_step(folders: tuple[Path, Path], step: int) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """A row a layer, and the first token that differs, if any."""
    from moe_dist.moe.ledger import compare
    from moe_dist.train.routing_ledger import SHAPE, check_header, read_page

    a, b = (read_page(folder, step) for folder in folders)
    check_header(str(folders[1]), b.header, a.header, SHAPE)
    tokens = int((a.token_T != b.token_T).sum())
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] | None = None
    for block in a.choices:
        found = compare(a.choices[block], b.choices[block])
        row = {"step": step, "layer": block, "tokens": len(a.token_T), "tokens_differ": tokens}
        rows.append({**row, "experts": found.experts, "drops": found.drops, "gate": found.gate})
        if first is None and found.first is not None:
            experts = {name: _in_words(page, block, found.first) for name, page in (("a", a), ("b", b))}
            first = {"step": step, "layer": block, "token": found.first, **experts}
    return rows, first


def _in_words(page: Page, block: int, token: int) -> str:
    """A token's experts, such as `3 5 (dropped)`."""
    choices, words = page.choices[block], []
    for k, expert in enumerate(choices.expert_TK[token].tolist()):
        asked = choices.asks_TK is None or bool(choices.asks_TK[token, k])
        kept = "" if choices.kept_TK[token, k] else " (dropped)"
        words.append(f"{expert}{kept if asked else ' (not asked)'}")
    return " ".join(words)


def _print_diff(rows: list[dict[str, Any]], first: Any, only: list[int], equal: bool, stream: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "layer", "tokens", "other experts", "other drops", "gate difference", box=None)
    differing = [row for row in rows if row["experts"] or row["drops"]]
    for row in (differing or rows)[:_ROWS_SHOWN]:
        counts = (row[name] for name in ("step", "layer", "tokens", "experts", "drops"))
        table.add_row(*map(str, counts), f"{row['gate']:.3g}")
    console = Console(file=stream, highlight=False, markup=False)
    console.print(table)
    if len(differing or rows) > _ROWS_SHOWN:
        console.print(f"... {len(differing or rows) - _ROWS_SHOWN} more rows: --json has all")
    if only:
        console.print(f"steps in one of the two alone: {_span(only)}")
    strange = [row["step"] for row in rows if row["tokens_differ"]]
    if strange:
        console.print(f"from step {strange[0]} on the batches hold other tokens: other data, tokenizer or seed")
    if first:
        console.print(f"first: step {first['step']}, layer {first['layer']}, token {first['token']}")
        console.print(f"  A  experts {first['a']}\n  B  experts {first['b']}")
    console.print("equal" if equal else "different")


def _print_drift(config: Config, summary: dict[str, Any], stream: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "loss", "drift", "largest of a layer", box=None)
    for step, (loss, drift) in enumerate(zip(summary["losses"], summary["drift"], strict=True), start=1):
        worst = max(range(len(drift)), key=drift.__getitem__, default=0)
        mean = sum(drift) / max(1, len(drift))
        largest = f"{drift[worst]:.2%} in layer {config.model.moe_blocks[worst]}" if drift else ""
        table.add_row(str(step), f"{loss:.6f}", f"{mean:.2%}", largest)
    Console(file=stream, highlight=False, markup=False).print(table)


def _run(config: Config, ranks: int) -> dict[str, Any]:
    from data_pipeline.build import build
    from launch.build_progress import BuildProgress
    from launch.local import run_local
    from launch.progress import follow, open_display
    from moe_dist.parallel.layout import layout_of

    layout_of(config, ranks, config.parallel.ranks_per_node)
    with open_display() as display, _output_to_stderr():
        build_dir = build(config, False, BuildProgress(display))
        with follow(Path(config.run.dir), display):
            return run_local(config, build_dir, ranks, _WORKER, say=display.message)


def _exit_if_interrupted(summary: dict[str, Any]) -> None:
    if summary["status"] == "interrupted":
        raise typer.Exit(ExitCode.INTERRUPTED)


def _span(steps: Any) -> str:
    """`1 to 5` for many steps."""
    found = sorted(steps)
    return f"{found[0]} to {found[-1]}" if len(found) > 1 else str(found[0])


def _answer(as_json: bool, figures: dict[str, Any], text: str) -> None:
    if as_json or text:
        typer.echo(json.dumps(figures) if as_json else text)


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield
