"""Small models beside each other: the same data, the same training compute, several seeds.

A cell is one variant with one seed: an ordinary run of one process, `moe-dist simulate`, in its own directory, whose
`summary.json` is its result. A cell that has one is not trained again, and one that was stopped goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from launch.environment import cores
from launch.run_directory import CONFIG_FILE, finished_summary, prepare
from moe_dist.config import Config, load_config
from moe_dist.errors import ConfigError, TrainingFault

_POLL_SECONDS = 0.2
_LOG = "ablate.log"
# Sections in which variants may not differ, or their figures are not of the same text; below model, the vocabulary.
_SHARED = ("data", "evaluate")


@dataclass(frozen=True)
class Variant:
    """One file.

    Attributes:
        name: The file's, without its ending.
        config: With as many steps as the compute of the reference allows.
        flops: Of the whole run, forward and backward, as `moe_dist/model/flops.py` counts them.
        share: Of the compute of the reference.
        parameters: In total and active for a token.
    """

    name: str
    config: Config
    flops: float
    share: float
    parameters: dict[str, int]


@dataclass(frozen=True)
class Cell:
    """One run."""

    variant: str
    seed: int
    config: Config

    @property
    def summary(self) -> dict[str, Any] | None:
        """Its result; None where it is not finished."""
        return finished_summary(self.config)


def plan_variants(files: Sequence[str], overrides: Sequence[str], reference: str | None) -> list[Variant]:
    """The files as variants of the same compute, the reference first.

    Args:
        files: YAML files.
        overrides: Items like `train.steps=20`, for all of them.
        reference: Name of the variant whose compute all get; None takes the first.

    Raises:
        ConfigError: A file is wrong, two have one name, or they would be judged by different text.
    """
    configs = {Path(file).stem: load_config(file, overrides) for file in files}
    if len(configs) < len(files):
        raise ConfigError("CONFIG", ", ".join(files), "the name of a file is that of its variant", "other file names")
    first = next(iter(configs)) if reference is None else reference
    if first not in configs:
        raise ConfigError("--reference", first, "the name of one of the variants", ", ".join(configs))
    for name, config in configs.items():
        _check_same_text(name, config, configs[first])
    budget = _step_flops(configs[first]) * configs[first].train.steps
    names = [first, *(name for name in configs if name != first)]
    return [_variant(name, configs[name], budget) for name in names]


def cells_of(variants: Sequence[Variant], seeds: int, out: Path, jobs: int) -> list[Cell]:
    """All cells, seed by seed, so that a first comparison of all variants is there early."""
    first = variants[0].config.seed
    return [_cell(variant, seed, out, jobs) for seed in range(first, first + seeds) for variant in variants]


def run_cells(cells: Sequence[Cell], jobs: int, told: Callable[[Cell, int], None]) -> None:
    """Trains the cells that are not finished, some at a time.

    Args:
        cells: All cells.
        jobs: Processes at a time.
        told: Is told of each cell that is finished, and how many then are.

    Raises:
        ConfigError: The directory of a cell holds a run of another config; nothing was started.
        TrainingFault: Cells failed; the others were finished.
    """
    waiting, running, failed = deque(_unfinished(cells)), dict[subprocess.Popen[bytes], Cell](), list[Cell]()
    done = len(cells) - len(waiting)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                running[_start(cell)] = cell
            time.sleep(_POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                cell = running.pop(process)
                if process.returncode:
                    failed.append(cell)
                else:
                    done += 1
                    told(cell, done)
    finally:
        for process in running:
            process.terminate()  # it writes a checkpoint, from which the same command goes on
        for process in running:
            process.wait()
    if failed:
        where = ", ".join(cell.config.run.dir for cell in failed)
        rule = f"every cell is trained; the others are: {done} of {len(cells)}"
        raise TrainingFault(where, f"{len(failed)} cells ended early", rule, f"read {_LOG} there; then the same again")


def results_of(variants: Sequence[Variant], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each variant: what it is, its bits per byte by seed, and how far they are from the reference's.

    Differences are taken seed by seed: a seed decides the order of the data, which all variants see alike.
    """
    rows: list[dict[str, Any]] = []
    for variant in variants:
        mine = [cell for cell in cells if cell.variant == variant.name]
        summaries = [summary for cell in mine if (summary := cell.summary) is not None]
        bits = [summary["heldout"]["after"]["bits_per_byte"] for summary in summaries]
        than = rows[0]["bits_per_byte"] if rows else bits
        apart = [here - there for here, there in zip(bits, than, strict=True)]
        rows.append(
            {
                "name": variant.name,
                "parameters": variant.parameters,
                "steps": variant.config.train.steps,
                "flops": variant.flops,
                "compute": variant.share,
                "seeds": [cell.seed for cell in mine],
                "bits_per_byte": bits,
                "mean": fmean(bits),
                "spread": max(bits) - min(bits),
                "difference": apart,
                "mean_difference": fmean(apart),
                "max_vio": [_mean_violation(summary) for summary in summaries],
                "seconds": [summary["seconds"] for summary in summaries],
                "run_dirs": [cell.config.run.dir for cell in mine],
            }
        )
    return rows


def _check_same_text(name: str, config: Config, reference: Config) -> None:
    for section in _SHARED:
        for key, value in getattr(reference, section):
            found = getattr(getattr(config, section), key)
            if found != value:
                rule = "all variants learn from and are judged by the same rows of the same text"
                raise ConfigError(f"{name}: {section}.{key}", found, rule, f"{section}.{key}={value}")
    if config.model.vocab_size != reference.model.vocab_size:
        found, wanted = config.model.vocab_size, reference.model.vocab_size
        rule = "all variants have one tokenizer, which is trained for the vocabulary"
        raise ConfigError(f"{name}: model.vocab_size", found, rule, f"model.vocab_size={wanted}")


def _variant(name: str, config: Config, budget: float) -> Variant:
    from moe_dist.model.flops import count_parameters

    steps = max(1, round(budget / _step_flops(config)))
    flops, counts = steps * _step_flops(config), count_parameters(config.model)
    train = config.train.model_copy(update={"steps": steps})
    parameters = {"total": counts.total, "active": counts.active}
    return Variant(name, config.model_copy(update={"train": train}), flops, flops / budget, parameters)


def _step_flops(config: Config) -> float:
    from moe_dist.model.flops import training_flops_per_token

    length = config.data.sequence_length_tokens
    return training_flops_per_token(config.model, length) * length * config.train.global_batch_sequences


def _cell(variant: Variant, seed: int, out: Path, jobs: int) -> Cell:
    config = variant.config
    threads = config.train.threads_per_rank or max(1, int(cores()) // jobs)
    sections = {
        "run": config.run.model_copy(update={"dir": str(out / variant.name / f"seed-{seed}")}),
        "train": config.train.model_copy(update={"threads_per_rank": threads}),
    }
    return Cell(variant.name, seed, config.model_copy(update={"seed": seed, **sections}))


def _unfinished(cells: Sequence[Cell]) -> Iterator[Cell]:
    """The cells that are to be trained; their directories hold their config."""
    for cell in cells:
        if prepare(cell.config, again=False) is None:
            yield cell


def _start(cell: Cell) -> subprocess.Popen[bytes]:
    """A process that trains a cell; what it says goes to a file beside its figures."""
    folder = Path(cell.config.run.dir)
    command = [sys.executable, "-m", "launch.cli", "simulate", str(folder / CONFIG_FILE), "--ranks", "1"]
    with (folder / _LOG).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(os.environ))


def _mean_violation(summary: dict[str, Any]) -> float | None:
    """MaxVio of a step, in the mean over layers and the last steps; None without experts."""
    loads = summary["expert_load"]
    return fmean(layer["max_vio_step"] for layer in loads) if loads else None
