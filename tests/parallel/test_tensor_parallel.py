"""Tensor, sequence and expert-tensor parallelism: the step of every layout is that of one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from moe_dist.config import Config
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step
from tests.support.routers import ROUTERS
from tests.support.tolerances import RELATIVE

TOLERANCE = RELATIVE[torch.float64]
MODEL = {"num_heads": 4, "num_kv_heads": 2, "num_dense_layers": 1, "num_layers": 3}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropless": ({}, {}),
    "untied": ({"shared_expert_width": 0}, {"tie_embeddings": False}),
    "capacity of sequences by probability": ({"capacity_factor": 0.8}, {}),
    "capacity choice-major, global balance": (
        {"capacity_factor": 0.8, "drop_policy": "position_choice_major", "balance_scope": "global"},
        {},
    ),
    "capacity of the rank, micro-batch balance": (
        {"capacity_factor": 0.8, "capacity_group": "rank", "balance_scope": "micro_batch"},
        {},
    ),
    "sigmoid, groups, bias, gelu": ({**ROUTERS["sigmoid, groups, bias"], "activation": "gelu", "latent_width": 6}, {}),
    "noisy with jitter": ({**ROUTERS["noisy"], "input_jitter": 0.1}, {}),
    "gshard": (ROUTERS["gshard"], {}),
    "hash": (ROUTERS["hash"], {}),
}
# ranks: (tensor, expert, expert-tensor)
LAYOUTS = {2: [(2, 1, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2)], 4: [(2, 2, 1), (2, 4, 1), (2, 2, 2), (1, 2, 2), (2, 1, 4)]}
ROWS = {2: 3, 4: 5}


def config_of(variant: str, ranks: int, degrees: tuple[int, int, int]) -> Config:
    moe, model = VARIANTS[variant]
    tensor, expert, cut = degrees
    parallel = {"tensor": tensor, "expert": expert, "expert_tensor": cut}
    by_rank = moe.get("capacity_group") == "rank" or moe.get("balance_scope") == "micro_batch"
    train = {"global_batch_sequences": ROWS[ranks], "micro_batch_sequences": ROWS[ranks] if by_rank else 2}
    options = {"balance_loss": 0.2, "z_loss": 0.01, **moe}
    return small_config(options, model={**MODEL, **model}, parallel=parallel, train={**train, "clip_norm": 0.5})


def shares_of(ranks: int, tensor: int) -> list[Any]:
    rows, copies = random_rows(ROWS[ranks]), ranks // tensor
    return [rows[len(rows) * c // copies : len(rows) * (c + 1) // copies] for c in range(copies)]


def cases_of(ranks: int) -> list[tuple[str, tuple[int, int, int]]]:
    """What a rank counts by itself is the same only where one copy of the dense parameters reads all rows."""
    whole = {"capacity of the rank, micro-batch balance"}
    return [(v, d) for v in VARIANTS for d in LAYOUTS[ranks] if v not in whole or d[0] == ranks]


def steps_of_rank(rank: int, ranks: int) -> dict[Any, StepProof]:
    found = {}
    for variant, degrees in cases_of(ranks):
        config = config_of(variant, ranks, degrees)
        found[variant, degrees] = candidate_step(rank, config, degrees[1], shares_of(ranks, degrees[0]))
    return found


@cache
def steps_of(ranks: int) -> list[dict[Any, StepProof]]:
    return run_gang(steps_of_rank, ranks, ranks, timeout_seconds=300)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_cut_makes_the_step_of_one_process(ranks):
    for variant, degrees in cases_of(ranks):
        expected = oracle_step(config_of(variant, ranks, degrees), random_rows(ROWS[ranks]))
        if "capacity" in variant:
            assert not torch.equal(expected.counts[0], expected.counts[1]), "the case must drop something"
        difference = first_difference([found[variant, degrees] for found in steps_of(ranks)], expected, TOLERANCE)
        assert difference is None, f"{variant}, tensor, expert, expert-tensor {degrees} of {ranks}: {difference}"
