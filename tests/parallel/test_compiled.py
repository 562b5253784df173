"""Compiled blocks make the step of one process that is not compiled, whatever is around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from moe_dist.config import Config
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step
from tests.support.tolerances import RELATIVE

ROWS = 5  # ranks and micro-batches differ, and one is empty
MODEL = {"num_heads": 4, "num_kv_heads": 2, "num_dense_layers": 1}
# parallel, kind of recompute, documents
LAYOUTS: list[tuple[dict[str, Any], str, str]] = [
    ({"expert": 2}, "none", "joined"),
    ({"expert": 1, "data": "fsdp"}, "selective", "separate"),
    ({"tensor": 2, "expert": 2}, "full", "joined"),
]


def config_of(parallel: dict[str, Any], recompute: str, documents: str, compiled: bool) -> Config:
    train = {"global_batch_sequences": ROWS, "micro_batch_sequences": 2, "recompute": recompute, "compile": compiled}
    return small_config(
        {"balance_loss": 0.2, "capacity_factor": 1.0},
        model=MODEL,
        train=train,
        parallel=parallel,
        data={"documents": documents},
    )


def steps_of_rank(rank: int, ranks: int) -> tuple[list[StepProof], int]:
    """The steps, and how many pieces of code were compiled for them."""
    found = []
    for parallel, recompute, documents in LAYOUTS:
        readers = ranks // parallel.get("tensor", 1)
        shares = [random_rows(ROWS)[ROWS * r // readers : ROWS * (r + 1) // readers] for r in range(readers)]
        found.append(candidate_step(rank, config_of(parallel, recompute, documents, True), parallel["expert"], shares))
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.timeout(600)
def test_compiled_blocks_make_the_step_of_one_process():
    results = run_gang(steps_of_rank, 2, 2, timeout_seconds=500)
    for place, (parallel, recompute, documents) in enumerate(LAYOUTS):
        expected = oracle_step(config_of(parallel, recompute, documents, False), random_rows(ROWS))
        difference = first_difference([found[place] for found, _ in results], expected, RELATIVE[torch.float64])
        assert difference is None, f"{parallel}, {recompute}: {difference}"
    assert all(graphs > 0 for _, graphs in results), "nothing was compiled"
