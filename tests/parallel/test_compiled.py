"""Compiled blocks make the step of one process that is not compiled, whatever is around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from moe_dist.config import Config
from tests.support.attention import ATTENTION
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step
from tests.support.tolerances import RELATIVE

ROWS = 5  # ranks and micro-batches differ, and one is empty
MODEL = {"num_heads": 4, "num_kv_heads": 2, "num_dense_layers": 1}
WHOLE, _, LATENT, _ = ATTENTION
# parallel, kind of recompute, documents, options of attention
LAYOUTS: list[tuple[dict[str, Any], str, str, str | None]] = [
    ({"expert": 2}, "none", "joined", None),
    ({"expert": 1, "data": "fsdp"}, "selective", "separate", None),
    ({"tensor": 2, "expert": 2}, "full", "joined", None),
]
OPTIONS = [
    ({"tensor": 2, "expert": 2}, "selective", "joined", WHOLE),
    ({"expert": 1, "data": "fsdp"}, "full", "separate", LATENT),
]


def config_of(layout: tuple[dict[str, Any], str, str, str | None], compiled: bool) -> Config:
    parallel, recompute, documents, attention = layout
    train = {"global_batch_sequences": ROWS, "micro_batch_sequences": 2, "recompute": recompute, "compile": compiled}
    return small_config(
        {"balance_loss": 0.2, "capacity_factor": 1.0},
        model={**MODEL, **ATTENTION.get(attention or "", {})},
        train=train,
        parallel=parallel,
        data={"documents": documents},
    )


def steps_of_rank(rank: int, ranks: int, layouts: list[Any]) -> tuple[list[StepProof], int]:
    """The steps, and how many pieces of code were compiled for them."""
    found = []
    for layout in layouts:
        parallel = layout[0]
        readers = ranks // parallel.get("tensor", 1)
        shares = [random_rows(ROWS)[ROWS * r // readers : ROWS * (r + 1) // readers] for r in range(readers)]
        found.append(candidate_step(rank, config_of(layout, True), parallel["expert"], shares))
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(OPTIONS, marks=pytest.mark.slow)], ids=["plain", "options"])
def test_compiled_blocks_make_the_step_of_one_process(layouts):
    results = run_gang(steps_of_rank, 2, 2, layouts, timeout_seconds=500)
    for place, layout in enumerate(layouts):
        expected = oracle_step(config_of(layout, False), random_rows(ROWS))
        difference = first_difference([found[place] for found, _ in results], expected, RELATIVE[torch.float64])
        assert difference is None, f"{layout}: {difference}"
    assert all(graphs > 0 for _, graphs in results), "nothing was compiled"
