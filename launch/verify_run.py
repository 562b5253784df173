"""What every rank of `moe-dist verify` does: the cells of the proof, one after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.interrupt import STOP_FILE
from moe_dist.config import Config
from moe_dist.runtime.process import Process
from moe_dist.train import PROGRESS_FILE
from moe_dist.verify.lattice import cells_of
from moe_dist.verify.proof import Proof, Result, summary_of

FULL_FILE = "full"  # beside the oracles, where all cells are asked for


def run_cells(config: Config, folder: Path, process: Process) -> dict[str, Any]:
    """Compares every cell.

    Args:
        config: Shrunk.
        folder: Where the oracles are.
        process: This rank.

    Returns:
        The summary, with `status`: `finished` or `interrupted`.
    """
    cells = cells_of(config, process.world_size, (folder / FULL_FILE).exists())
    proof = Proof(config, process.world_size, cells, folder)
    run_dir, different = Path(config.run.dir), 0
    results: list[Result] = []
    for result in proof.run((run_dir / STOP_FILE).exists):
        results.append(result)
        different += result.first is not None
        if process.rank == 0:
            event = {"event": "cell", "done": len(results), "total": len(proof.cells), "different": different}
            with (run_dir / PROGRESS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
    status = "finished" if len(results) == len(proof.cells) else "interrupted"
    return {"status": status, **summary_of(results)}
