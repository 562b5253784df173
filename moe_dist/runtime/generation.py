"""Generations of a run: each start of its ranks is one, and processes of an earlier one may write nothing any more.

A rank that was stopped, cut off or forgotten may wake up when others have taken its place. The number of the newest
generation stands in `<run.dir>/generation`; whoever writes into the run's directory asks first whether it is still his.
Between the question and the write lies some microseconds; a checkpoint that is being written has a folder of its own,
which the next generation removes before it begins, so that nothing half-known can be published in them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from moe_dist.errors import TrainingFault

GENERATION_FILE = "generation"


def newest_generation(run_dir: Path) -> int:
    """The number of the newest generation; 0 where none was begun."""
    try:
        return int((run_dir / GENERATION_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0


def begin_generation(run_dir: Path) -> int:
    """Begins the next generation, from which on all earlier ones are refused; for the one launcher of a run."""
    number = newest_generation(run_dir) + 1
    run_dir.mkdir(parents=True, exist_ok=True)
    draft = run_dir / f".{GENERATION_FILE}-{os.getpid()}"
    draft.write_text(f"{number}\n", encoding="utf-8")
    draft.replace(run_dir / GENERATION_FILE)
    return number


@dataclass(frozen=True)
class Fence:
    """Refuses writes of an older generation.

    Attributes:
        run_dir: The run's directory; None refuses nothing (tests, tools).
        number: The generation that this process belongs to.
    """

    run_dir: Path | None = None
    number: int = 0

    def check(self) -> None:
        """Returns if this generation is the newest.

        Raises:
            TrainingFault: A later one has begun.
        """
        if self.run_dir is None:
            return
        newest = newest_generation(self.run_dir)
        if newest > self.number:
            raise TrainingFault(
                str(self.run_dir),
                f"generation {self.number}; {newest} has begun",
                "only ranks of the newest generation write into a run's directory",
                "nothing to do: this process was replaced and ends",
            )
