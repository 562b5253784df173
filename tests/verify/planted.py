"""Plants mistakes in the ranks of `moe-dist verify`, one by one, and prints what it says of each.

    python -m tests.verify.planted            a table
    python -m tests.verify.planted --json     the same for a program

Each is one cell of a proof on four ranks, made twice: right, which must be equal, and with the mistake, which must be
found in its stage, in its group, and explained. The exit status is 1 if one is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from launch.local import run_local
from moe_dist.config import Config, load_config
from moe_dist.parallel.layout import legal_layouts
from moe_dist.runtime.process import Process
from moe_dist.verify.lattice import Cell, _batches, _placed, cells_of
from moe_dist.verify.proof import Proof, summary_of
from moe_dist.verify.shrink import shrunk
from tests.launch.conftest import ROOT
from tests.verify.mistake import Mistake
from tests.verify.mistakes import MISTAKES
from tests.verify.patches import with_changes

RANKS = 4
# Options that depend on the cut by their definition, which one process must follow micro-batch by micro-batch.
BY_CUT: dict[str, dict[str, Any]] = {
    "running": {"global_balance": "running", "balance_scope": "global"},
    "micro_step": {"global_balance": "micro_step", "balance_scope": "global"},
    "capacity of a rank": {"capacity_group": "rank", "capacity_factor": 0.75, "balance_scope": "global"},
}
# Traps that no step of `verify` can show, in whole or in part: why, and the test that covers them, under tests/.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "4": (
        "rows that are routed again differ in number unless they are padded, and then torch itself ends the run",
        "moe/test_ledger.py::test_recompute_after_the_bias_moved_still_follows",
    ),
    "7": (
        "such a config is refused before any step",
        "config/test_rules.py::test_rule_broken_names_key_value_rule_and_fix",
    ),
    "8": (
        "selection biases begin at 0, so that no open group scores below 0 in a first step",
        "moe/test_selection.py::test_groups_closed_one_never_wins_even_with_negative_biases",
    ),
    "12": (
        "a proof is in fp64 and counts a hundred tokens",
        "train/test_step_terms.py::test_load_is_counted_exactly_beyond_what_a_narrow_type_holds",
    ),
    "15": (
        "a step saves nothing",
        "checkpoint/test_checkpoint.py::test_experts_survive_from_four_ranks_to_one_two_and_three",
    ),
    "17": (
        "ranks and oracle score by the same code, whichever it is",
        "moe/test_routers.py::test_balance_does_not_fall_below_one_when_all_logits_shift",
    ),
    "18": (
        "rows by rank, entropy and bytes are not compared, only what experts are asked for and serve",
        "train/test_step_terms.py::test_imbalance_is_of_the_load_of_all_ranks_together",
    ),
    "22": (
        "SGD has no decay, no momentum and no matrices: of the update only clipping and what is skipped is seen",
        "train/test_step_terms.py::test_stacked_experts_are_updated_as_so_many_single_ones",
    ),
    "23": (
        "a step reads no data: that ranks take equally many steps is the loader's part",
        "data_pipeline/test_loader.py::test_ranks_take_equally_many_steps_past_the_end_of_the_split",
    ),
    "25": (
        "the grouped product knows no fp64",
        "moe/test_experts.py::test_experts_any_counts_equal_one_product_an_expert",
    ),
}


def small_demo(*overrides: str) -> Config:
    """The config of the main job, cut down as `verify` does."""
    return shrunk(load_config(str(ROOT / "configs" / "demo.yaml"), overrides))[0]


def cell_of(config: Config, tensor: int, expert: int, expert_tensor: int = 1, **asked: Any) -> Cell:
    """A cell of all four ranks with these degrees, and the usual options but for those that are asked for."""
    degrees = (tensor, expert, expert_tensor)
    [layout] = (
        found for found in legal_layouts(config, RANKS) if (found.tensor, found.expert, found.expert_tensor) == degrees
    )
    rows, micro = asked.pop("rows", "even"), asked.pop("micro", 2)
    batch = next(found for found in _batches(layout.data, RANKS) if (found.name, found.micro) == (rows, micro))
    usual = {"dispatch": "all_to_all", "keeping": "replicate", "capacity": "as configured", "scope": "sequence"}
    cell = _placed(config, Cell(layout, batch=batch, **{**usual, "recompute": "none", **asked}))
    assert cell is not None, "a mistake is planted in a cell that may be"
    return cell


def proofs(config: Config, folder: Path) -> dict[str, Proof]:
    """A proof of one cell a mistake, and of some cells for each option that depends on the cut."""
    found = {}
    for name, mistake in MISTAKES.items():
        changed = with_changes(config, mistake.config)
        found[name] = Proof(changed, RANKS, [cell_of(changed, **mistake.cell)], folder / name)
    for name, changes in BY_CUT.items():
        changed = with_changes(config, {f"model.moe.{key}": value for key, value in changes.items()})
        some = [cell for cell in cells_of(changed, RANKS, full=False) if cell.scope != "sequence"][::6]
        found[name] = Proof(changed, RANKS, some, folder / name)
    return found


def run_planted(config: Config, folder: Path, process: Process) -> dict[str, Any]:
    """Every proof as it is, and with its mistake."""
    result: dict[str, Any] = {"status": "finished"}
    known: dict[Any, dict[str, Any]] = {}  # of cells that several mistakes share
    for name, proof in proofs(config, folder).items():
        key = (repr(proof.config), tuple(proof.cells))
        if key not in known:
            known[key] = summary_of(list(proof.run(lambda: False)))
        result[name] = {"right": known[key]}
        if name in MISTAKES:
            with MISTAKES[name].patch():
                result[name]["planted"] = summary_of(list(proof.run(lambda: False)))
    return result


def run_lattice_with_mistake(config: Config, folder: Path, process: Process) -> dict[str, Any]:
    """The worker of `moe-dist verify` with expert gradients scaled by the expert degree."""
    from launch.verify_run import run_cells

    with MISTAKES["expert gradients over the expert degree"].patch():
        return run_cells(config, folder, process)


def run_gang(folder: Path) -> dict[str, Any]:
    """What four ranks found in each proof: `right`, and `planted` with its mistake."""
    config = with_changes(small_demo(), {"run.dir": str(folder)})
    for name, proof in proofs(config, folder).items():
        (folder / name).mkdir()
        proof.write_oracles(lambda done, total: None)
    return run_local(config, folder, RANKS, "tests.verify.planted:run_planted")


@dataclass(frozen=True)
class Finding:
    """A planted mistake and what was said of it; `caught` if that is what must be said."""

    trap: str
    mistake: str
    layout: str
    stage: str | None
    group: str | None
    diagnosis: str | None
    caught: bool


def finding_of(name: str, found: dict[str, Any]) -> Finding:
    """Judges what the ranks found in a proof."""
    mistake, [cell] = MISTAKES[name], found["planted"]["cells"]
    placed = (cell["stage"], cell["group"]) == mistake.place
    explained = placed and all(words in cell["diagnosis"] for words in mistake.words)
    told = (cell["layout"], cell["stage"], cell["group"], cell["diagnosis"])
    return Finding(mistake.trap, name, *told, caught=found["right"]["equal"] and explained)


def order_of(trap: str) -> tuple[int, str]:
    """Numbers first."""
    return (int(trap), "") if trap.isdecimal() else (1000, trap)


def in_order() -> list[tuple[str, Mistake]]:
    """The mistakes by trap."""
    return sorted(MISTAKES.items(), key=lambda named: order_of(named[1].trap))


def _named(name: str) -> str:
    shipped = MISTAKES[name].shipped
    return f"{name} ({shipped})" if shipped else name


def docs_rows() -> list[str]:
    """The rows of the tables in docs/numerics.md."""
    planted = [
        f"| {mistake.trap} | {_named(name)} | {', '.join(mistake.place)} | {'; '.join(mistake.words)} |"
        for name, mistake in in_order()
    ]
    elsewhere = []
    for trap, (why, test) in ELSEWHERE.items():
        file, _, function = test.partition("::")
        elsewhere.append(f"| {trap} | {why} | `{file}`: `{function}` |")
    return planted + elsewhere


def table_of(findings: list[Finding]) -> Table:
    """A row for every mistake."""
    headings = "trap", "planted mistake", "layout", "stage", "diagnosis", "caught"
    table = Table(*headings, title="Mistakes planted in the ranks of verify", show_lines=True)
    for found in findings:
        stage = f"{found.stage}, {found.group}" if found.stage else ""
        told = found.diagnosis or ""
        caught = "[green]yes" if found.caught else "[red]no"
        table.add_row(found.trap, _named(found.mistake), found.layout, stage, told, caught)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Plants everything; 0 if every mistake is placed and explained."""
    parser = argparse.ArgumentParser(prog="python -m tests.verify.planted", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="moe-dist-planted-") as folder:
        found = run_gang(Path(folder))
    findings = [finding_of(name, found[name]) for name, _ in in_order()]
    missed = [finding for finding in findings if not finding.caught]
    if asked.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(table_of(findings))
        print(f"{len(findings) - len(missed)} of {len(findings)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
