"""The proof from both ends: what the launcher prepares in one process, and what each of many ranks then compares.

<folder>/oracle-3.pt    steps of one process, by the order in which cells first need them
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.errors import TrainingFault
from moe_dist.parallel.collectives import gather_objects
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Groups, Mesh, build_mesh
from moe_dist.verify.compare import STAGES, Difference, Report, compare_gradients, compare_step, join_reports
from moe_dist.verify.diagnosis import common_ground, diagnose
from moe_dist.verify.lattice import Cell, config_of, cut_of, depends_on_cut, oracle_key, rows_of
from moe_dist.verify.reference import judge_layers
from moe_dist.verify.step import StepProof, candidate_step, oracle_step, parallel_trainee
from moe_dist.verify.tolerances import RELATIVE

TOLERANCE = RELATIVE[torch.float64]
DEGREES = ("ranks", "data", "tensor", "expert", "expert_data", "expert_tensor")
_LIMIT_SECONDS = 60.0

Tell = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Result:
    """A cell and how it compares: largest error by stage, the first difference and what it says."""

    cell: Cell
    stages: dict[str, float]
    first: Difference | None
    diagnosis: str | None


class Proof:
    """The cells of a config on some ranks, and the folder with their oracles.

    Args:
        config: Small enough (`shrunk`).
        ranks: Processes.
        cells: What is proven, neighbours of one layout together.
        folder: Of the oracles' steps.
    """

    def __init__(self, config: Config, ranks: int, cells: list[Cell], folder: Path) -> None:
        self.config, self.ranks, self.cells, self.folder = config, ranks, cells, folder
        self._keys = [oracle_key(config, cell) for cell in cells]
        self._order = list(dict.fromkeys(self._keys))

    def judge_layers(self, tell: Tell) -> dict[str, Any]:
        """Judges the layers of the one-process model by `moe/reference.py`, once for each set of their options.

        Returns:
            `options`, `worst`, and `first_difference`, the first thing beyond the tolerance or None.
        """
        # In one process the micro-batch is the whole batch, so that two of the scopes are one.
        judged = [cell for cell in self.cells if cell.scope != "micro_batch"] or self.cells
        sets = {(cell.capacity, cell.scope): config_of(self.config, cell) for cell in judged}
        worst, first = 0.0, None
        for done, (names, options) in enumerate(sets.items()):
            tell(done, len(sets))
            with _one_thread():
                errors = judge_layers(options)
            for what, error in errors.items():
                worst = max(worst, error)
                if not error <= TOLERANCE and first is None:
                    first = f"{what} off by {error:.3g} with {' and '.join(names)}"
        tell(len(sets), len(sets))
        return {"options": len(sets), "worst": _finite(worst), "first_difference": first}

    def write_oracles(self, tell: Tell) -> None:
        """Makes every step of one process that cells are compared with."""
        for number, key in enumerate(self._order):
            tell(number, len(self._order))
            cell = self.cells[self._keys.index(key)]
            options = config_of(self.config, cell)
            cut = cut_of(cell) if depends_on_cut(options.model.moe) else None
            with _one_thread():
                oracle_step(options, rows_of(self.config, cell), cut).write(self._path(key))
        tell(len(self._order), len(self._order))

    def run(self, stop_asked: Callable[[], bool]) -> Iterator[Result]:
        """Makes and compares the step of every cell; entered by all ranks, which all get the results.

        Args:
            stop_asked: Whether this rank was asked to end; all end when one was.
        """
        groups = Groups(_LIMIT_SECONDS)
        everyone = build_mesh(Layout(self.ranks, 1, self.config.model.moe.num_experts), groups)
        for cell, key in zip(self.cells, self._keys, strict=True):
            mesh = build_mesh(cell.layout, groups, list(range(cell.layout.ranks)))
            expected = _read(self._path(key))
            try:
                report = _compare_cell(self.config, cell, mesh, expected) if mesh.rank >= 0 else None
            except Exception as error:
                error.add_note(f"in the cell {cell.layout}; {cell.options}")
                raise
            told = gather_objects((report, stop_asked()), everyone.world)
            whole = join_reports([report for report, _ in told if report is not None], expected)
            first = whole.differences[0] if whole.differences else None
            yield Result(cell, whole.errors, first, diagnose(whole, cell.degrees))
            if any(stop for _, stop in told):
                break
        groups.close()

    def _path(self, key: str) -> Path:
        return self.folder / f"oracle-{self._order.index(key)}.pt"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and lose much where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _read(path: Path) -> StepProof:
    return StepProof.read(path)


def _compare_cell(config: Config, cell: Cell, mesh: Mesh, expected: StepProof) -> Report:
    ends = torch.tensor(cell.batch.rows).cumsum(0).tolist()
    mine = slice(ends[mesh.data_place] - cell.batch.rows[mesh.data_place], ends[mesh.data_place])
    trainee = parallel_trainee(config_of(config, cell), mesh)
    gradients: dict[str, Tensor] = {}
    try:
        found = candidate_step(trainee, rows_of(config, cell)[mine], gradients)
    except TrainingFault as fault:  # on all ranks alike
        report = Report(held=set(expected.weights))
        compare_gradients(report, gradients, expected, TOLERANCE)
        text = f"{fault.value}, where {fault.rule}"
        report.note(Difference("gradient norm", "grad_norm", "grad_norm", math.inf, text), TOLERANCE)
        return report
    return compare_step(found, expected, TOLERANCE)


def summary_of(results: Sequence[Result]) -> dict[str, Any]:
    """The results as plain values: `cells`, and `failures`, those that differ in the same way taken together."""
    cells: list[dict[str, Any]] = [
        {
            "layout": str(result.cell.layout),
            "degrees": {name: getattr(result.cell.layout, name) for name in DEGREES},
            "options": result.cell.options,
            "equal": result.first is None,
            "worst": _finite(max(result.stages.values())),
            "stages": {stage: _finite(result.stages[stage]) for stage in STAGES},
            "first_difference": result.first and result.first.text,
            "stage": result.first and result.first.stage,
            "group": result.first and result.first.group,
            "diagnosis": result.diagnosis,
        }
        for result in results
    ]
    alike: dict[tuple[str, str], list[int]] = {}
    for place, cell in enumerate(cells):
        if not cell["equal"]:
            alike.setdefault((cell["stage"], cell["group"]), []).append(place)
    every = [result.cell.traits for result in results]
    failures = [
        {
            "stage": stage,
            "group": group,
            "cells": len(places),
            "first_difference": cells[places[0]]["first_difference"],
            "diagnoses": list(dict.fromkeys(cells[place]["diagnosis"] for place in places)),
            "layouts": list(dict.fromkeys(cells[place]["layout"] for place in places)),
            "common": common_ground(every, [place in places for place in range(len(every))]),
        }
        for (stage, group), places in alike.items()
    ]
    return {"cells": cells, "failures": failures, "equal": not failures}


def _finite(error: float) -> float:
    """JSON knows no infinity."""
    return min(error, sys.float_info.max)
