"""Plants the mistakes behind the known traps of MoE training, one by one, and prints which test catches each.

    python -m tests.traps            a table
    python -m tests.traps --json     the same for a program

A mistake of one process is put in place of the right function while its test runs; the test must pass without it and
fail with it. Those of several ranks are steps of a gang of four, compared with the step of one process. The exit status
is 1 if a mistake is missed or a trap has none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from tests.moe import test_ledger, test_planted, test_planted_more
from tests.parallel import test_expert_parallel as gang
from tests.support.gang import run_gang
from tests.support.parallel_step import first_difference
from tests.support.planted import failure_with
from tests.train import test_balance

TRAPS = {
    1: "expert gradients scaled by the expert-parallel degree",
    2: "balance loss scaled by copies, data ranks, accumulation or micro-batch size",
    3: "a global balance loss that is a running mean",
    4: "recompute routes again or counts twice",
    5: "the router sees partial tokens; replicas drift",
    6: "router gradient silently cut",
    7: "top-1 with a renormalised gate has no gradient from the language model",
    8: "a closed group still wins because it was masked with 0",
    9: "wrong or arbitrary drop order",
    10: "padding uses capacity or enters balance and z-loss",
    11: "counts after drops feed balance",
    12: "counters in a narrow type stop; buffers are cast with the module",
    14: "experts or ranks without tokens: missing or uninitialised gradients",
    16: "experts start identical, or replicas and layouts start different",
    17: "normalising with a tiny epsilon lets the router cheat the balance loss",
    18: "rank-local imbalance metrics",
    19: "rows in order of arrival where the product wants them by expert",
    22: "decay and momentum of idle experts; optimizers that mix stacked experts",
    25: "uninitialised rows of a grouped product; expanded gradients",
}
# Mistakes of the gang that belong to a trap: the name under which the gang's test knows them, and the trap.
OF_STEP = {
    "expert gradients over the expert degree": 1,
    "expert gradients not summed over copies": 1,
    "dense gradients averaged over ranks": 2,
    "router gradients left on their rank": 5,
    "balance from the counts of this rank only": 3,
    "rows left in order of arrival": 19,
}
OF_STEP_BY_TOKEN = {"gradient of the gates dropped": 6, "rows left in order of arrival": 19}
OF_LEDGER = {"recompute routes again": 4}


@dataclass(frozen=True)
class Finding:
    """A planted mistake and whether its test caught it; `told` is what the test said."""

    trap: int
    mistake: str
    test: str
    caught: bool
    told: str


def name_of_test(check: Callable[[], Any]) -> str:
    """`file::test` of a check: itself, or the test that a wrapper calls."""
    if check.__name__.startswith("test_"):
        return f"{_file(check.__module__)}::{check.__name__}"
    names = [name for name in check.__code__.co_names if name.startswith("test_")]
    module = check.__globals__[names[0]].__name__ if len(names) > 1 else check.__module__
    return f"{_file(module)}::{names[-1]}"


def _file(module: str) -> str:
    return module.replace(".", "/") + ".py"


def one_process() -> Iterator[Finding]:
    """The mistakes of the tables in tests/moe; those whose name starts with no number belong to no trap."""
    tables = [test_planted.PLANTED, test_planted_more.PLANTED]
    tables.append({f"{trap} {name}": test_ledger.PLANTED[name] for name, trap in OF_LEDGER.items()})
    for table in tables:
        for key, planted in table.items():
            number, _, text = key.partition(" ")
            if number.isdecimal():
                told = failure_with(planted)
                yield Finding(int(number), text, name_of_test(planted[3]), told is not None, told or "")


def several_ranks() -> Iterator[Finding]:
    """The mistakes planted in the steps of four ranks, and in the accumulating ones of two."""
    tests = gang.test_planted_mistakes_are_each_caught_where_they_are, OF_STEP, gang.EXPECTED_DIAGNOSIS
    yield from _of_gang(gang.planted, "global balance", *tests)
    by_token = gang.test_planted_mistakes_of_the_deduplicated_dispatcher_are_each_caught
    rest = by_token, OF_STEP_BY_TOKEN, gang.EXPECTED_DIAGNOSIS_BY_TOKEN
    yield from _of_gang(gang.planted_by_token, "seven experts, five a token, capacity", *rest)
    steps = run_gang(test_balance.planted, 2)
    assert test_balance.told_of("none", steps) is None, "the step without a mistake differs"
    for name in test_balance.mistakes():
        number, _, text = name.partition(" ")
        if number.isdecimal():
            told = test_balance.told_of(name, steps) or ""
            where = f"{_file(test_balance.__name__)}::test_planted_mistakes_are_each_caught"
            yield Finding(int(number), text, where, bool(told), told)


def _of_gang(
    planted: Any, variant: str, test: Any, traps: dict[str, int], diagnosis: dict[str, str]
) -> Iterator[Finding]:
    found, expected = run_gang(planted, 4), gang.expected_of(variant, 6)

    def told_of(name: str) -> str | None:
        return first_difference([rank[name] for rank in found], expected, gang.TOLERANCE)

    assert told_of("none") is None, f"without a mistake: {told_of('none')}"
    for name, trap in traps.items():
        told = told_of(name) or ""
        yield Finding(trap, name, name_of_test(test), bool(told) and diagnosis[name] in told, told)


def table_of(findings: list[Finding]) -> Table:
    """A row for every mistake, in the order of the traps; a trap without one has a row that says so."""
    headings = "#", "trap", "planted mistake", Column("test", overflow="fold"), "caught"
    table = Table(*headings, title="Planted traps")
    for trap, text in TRAPS.items():
        mine = [finding for finding in findings if finding.trap == trap]
        table.add_section()
        if not mine:
            table.add_row(str(trap), text, "[red]none", "", "[red]no")
        for place, finding in enumerate(mine):
            first = (str(trap), text) if place == 0 else ("", "")
            table.add_row(*first, finding.mistake, finding.test, "[green]yes" if finding.caught else "[red]no")
    return table


def main(arguments: list[str] | None = None) -> int:
    """Plants everything; 0 if every trap has a mistake and every mistake is caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.traps", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    asked = parser.parse_args(arguments)
    findings = sorted([*one_process(), *several_ranks()], key=lambda finding: finding.trap)
    missing = sorted(TRAPS.keys() - {finding.trap for finding in findings})
    missed = [finding for finding in findings if not finding.caught]
    if asked.json:
        print(json.dumps({"traps": TRAPS, "findings": [asdict(f) for f in findings], "without": missing}, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(table_of(findings))
        print(f"{len(findings) - len(missed)} of {len(findings)} caught; traps without a mistake: {missing or 'none'}")
    return 1 if missed or missing else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
