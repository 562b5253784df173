"""Fully sharded data parallelism: each sharing out makes the step of one process, and each rank keeps its part only."""

from __future__ import annotations

from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from moe_dist.config import Config
from moe_dist.errors import LayoutError
from moe_dist.parallel import gradients as gradients_module
from moe_dist.parallel.fsdp import local
from moe_dist.parallel.layout import Layout, layout_of
from moe_dist.train.evaluate import HeldOut, evaluate
from moe_dist.train.step import train_step
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step, parallel_trainee
from tests.support.routers import ROUTERS
from tests.support.tolerances import RELATIVE

TOLERANCE = RELATIVE[torch.float64]
MODEL = {"num_heads": 4, "num_kv_heads": 4, "num_dense_layers": 1, "num_layers": 3, "tie_embeddings": False}
# name: (moe options, train options)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact global balance, drops": ({"capacity_factor": 1.0, "balance_scope": "global"}, {}),
    "groups, bias; everything again": (ROUTERS["sigmoid, groups, bias"], {"recompute": "full"}),
    "gshard; some again": (ROUTERS["gshard"], {"recompute": "selective"}),
    "reference back end": ({"backend": "reference"}, {"micro_batch_sequences": 8}),
}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{"expert": 1}, {"expert": 2}],
    3: [{"expert": 1}, {"expert": 3}],
    4: [
        {"expert": 1},
        {"expert": 2},
        {"expert": 1, "data_shard": 2},
        {"expert": 2, "data_shard": 2, "dispatch": "deduplicated"},
        {"tensor": 2, "expert": 2},
        {"tensor": 2, "expert": 1, "expert_tensor": 2},
        {"tensor": 4, "expert": 2},  # nothing but experts to share out
    ],
}
ROWS = (3, 7)  # of four ranks one has none


def config_of(variant: str, parallel: dict[str, Any], rows: int) -> Config:
    moe, train = VARIANTS[variant]
    train = {"global_batch_sequences": rows, "micro_batch_sequences": 1, "clip_norm": 0.5, **train}
    options = {"balance_loss": 0.2, "z_loss": 0.01, **moe}
    return small_config(options, model=MODEL, train=train, parallel={**parallel, "data": "fsdp"})


def step_of(rank: int, ranks: int, variant: str, parallel: dict[str, Any], count: int) -> StepProof:
    rows, readers = random_rows(count), ranks // parallel.get("tensor", 1)
    shares = [rows[count * r // readers : count * (r + 1) // readers] for r in range(readers)]
    return candidate_step(rank, config_of(variant, parallel, count), parallel["expert"], shares)


def cases_of(ranks: int) -> list[tuple[str, int, int]]:
    """Variant, place of the layout, rows."""
    places = range(len(LAYOUTS[ranks]))
    return [(v, place, rows) for v in VARIANTS for place in places for rows in (ROWS if v == PLAIN else ROWS[1:])]


def steps_of_rank(rank: int, ranks: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for variant, place, rows in cases_of(ranks):
        found[variant, place, rows] = step_of(rank, ranks, variant, LAYOUTS[ranks][place], rows)
    for place, parallel in enumerate(LAYOUTS[ranks]):
        found["kept", place] = kept_bytes(parallel)
    if ranks == 4:
        for name, (patch, parallel) in MISTAKES.items():
            with patch():
                found[name] = step_of(rank, 4, PLAIN, parallel, 7)
    return found


def kept_bytes(parallel: dict[str, Any]) -> dict[str, list[int]]:
    """Bytes of parameters here, all and experts, before a step, after evaluation alone, and after a step."""
    trainee = parallel_trainee(config_of(PLAIN, parallel, 8), parallel["expert"], "adamw")

    def bytes_here() -> list[int]:
        named = list(trainee.model.named_parameters())
        return [sum(local(p).nbytes for name, p in named if part in name) for part in ("", ".experts.")]

    parts = random_rows(8).tensor_split(trainee.mesh.layout.data)
    rows = parts[trainee.mesh.data_place]
    found = {"before": bytes_here()}
    token_bytes = torch.ones(trainee.config.model.vocab_size, dtype=torch.int64)
    evaluate(trainee, HeldOut(rows, max(map(len, parts)), token_bytes))
    found["evaluated"] = bytes_here()
    train_step(trainee, rows, 0)
    found["trained"] = bytes_here()
    state = [held for state in trainee.optimizer.state.values() for name, held in state.items() if name != "step"]
    found["moments"] = [sum(local(held).nbytes for held in state)]
    return found


PLAIN = "exact global balance, drops"
MISTAKES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mean over ranks": (
        partial(mock.patch.object, FSDPModule, "set_gradient_divide_factor", lambda self, factor: None),
        {"expert": 2},
    ),
    "sums of a tensor group left out": (
        partial(mock.patch.object, gradients_module, "_sum_together", lambda parts, group: None),
        {"tensor": 2, "expert": 2},
    ),
    "norm of this rank's part": (
        partial(mock.patch.object, gradients_module, "sum_ranks", lambda tensor, group: tensor),
        {"expert": 1},
    ),
}


@cache
def steps_of(ranks: int) -> list[dict[Any, Any]]:
    return run_gang(steps_of_rank, ranks, ranks, timeout_seconds=300)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_sharing_out_makes_the_step_of_one_process(ranks):
    for variant, place, rows in cases_of(ranks):
        parallel = LAYOUTS[ranks][place]
        expected = oracle_step(config_of(variant, parallel, rows), random_rows(rows))
        proofs = [found[variant, place, rows] for found in steps_of(ranks)]
        difference = first_difference(proofs, expected, TOLERANCE)
        assert difference is None, f"{ranks} ranks, {variant}, {parallel}, {rows} rows: {difference}"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_caught(mistake):
    expected = oracle_step(config_of(PLAIN, MISTAKES[mistake][1], 7), random_rows(7))
    assert first_difference([found[mistake] for found in steps_of(4)], expected, TOLERANCE) is not None


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_rank_keeps_its_part_of_parameters_and_moments(ranks):
    """After a step, and after a forward pass without a backward pass, which gives nothing back by itself."""
    for place, parallel in enumerate(LAYOUTS[ranks]):
        found = [result["kept", place] for result in steps_of(ranks)]
        for kept in found:
            assert kept["before"] == kept["evaluated"] == kept["trained"], parallel
            assert kept["moments"] == [2 * kept["before"][0]]
        layout = layout_of(config_of(PLAIN, parallel, 8), ranks)
        copies = layout.expert_data // layout.expert_shard
        assert sum(kept["before"][1] for kept in found) == copies * bytes_of_experts(), parallel
        assert copies == (2 if "data_shard" in parallel and parallel["expert"] == 1 else 1)


def bytes_of_experts() -> int:
    """Of one copy of all experts of the model, in fp64."""
    config = config_of(PLAIN, {"expert": 1}, 8)
    moe, layers = config.model.moe, config.model.num_layers - config.model.num_dense_layers
    return layers * moe.num_experts * 3 * moe.expert_width * config.model.width * 8


def test_hybrid_groups_are_rows_of_neighbours_and_columns_between_them():
    groups = Layout(8, 2, 8, data_shard=4, expert_shard=2).groups()
    assert groups["data_shard"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups["data_copies"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups["expert_shard"] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert groups["expert_copies"] == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert "data_shard" not in Layout(8, 2, 8, data_shard=8, expert_shard=4).groups()


def test_a_share_that_does_not_divide_the_data_ranks_is_refused_with_the_nearest():
    config = config_of(PLAIN, {"expert": 2, "tensor": 2, "data_shard": 3}, 8)
    with pytest.raises(LayoutError) as caught:
        layout_of(config, 8)
    assert caught.value.where == "parallel.data_shard" and caught.value.value == 3
    assert "must divide the 4 ranks" in caught.value.rule and caught.value.fix == "parallel.data_shard=2"
