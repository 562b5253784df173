"""What a rank holds, as counted without processes, against what the ranks of real groups hold."""

from __future__ import annotations

from typing import Any

import torch

from moe_dist.model import Transformer
from moe_dist.parallel.apply import parallelize
from moe_dist.parallel.fsdp import local
from moe_dist.parallel.layout import layout_of
from moe_dist.parallel.memory import memory_of_rank, sizes_of
from tests.parallel.test_feed_forward_options import LAYOUTS, config_of
from tests.support.attention import ATTENTION
from tests.support.feed_forward import FEED_FORWARD
from tests.support.gang import run_gang
from tests.support.models import small_config
from tests.support.parallel_step import mesh_of

RANKS = 4
ASKED = [("replicate", 2, 1, 1), ("replicate", 1, 4, 1), ("zero1", 2, 2, 2), ("fsdp", 1, 2, 1)]


def configs() -> list[Any]:
    found = [config_of(name, layout) for name in FEED_FORWARD for layout in LAYOUTS[:2]]
    for model in ATTENTION.values():
        for data, tensor, expert, cut in ASKED[len(found) % 2 :: 2]:
            degrees = {"data": data, "tensor": tensor, "expert": expert, "expert_tensor": cut}
            found.append(small_config(model=model, parallel=degrees))
    return found


def parameters_here(rank: int) -> list[int]:
    found = []
    for config in configs():
        with torch.device("meta"):
            model = Transformer(config.model)
        parallelize(model, mesh_of(layout_of(config, RANKS)), config)
        found.append(sum(local(parameter).numel() for parameter in model.parameters()))
    return found


def test_parameters_of_the_fullest_rank_are_counted_exactly() -> None:
    held = run_gang(parameters_here, RANKS, timeout_seconds=150)
    for number, config in enumerate(configs()):
        counted = memory_of_rank(config, layout_of(config, RANKS), sizes_of(config.model))
        most = max(of_rank[number] for of_rank in held)
        if config.parallel.data == "fsdp":  # parts of rows are padded to equal ones, which cannot be counted so
            assert counted.parameters <= most <= 1.3 * counted.parameters
        else:
            assert counted.parameters == most, config.parallel


def test_moments_are_shared_out_where_they_are() -> None:
    sizes = sizes_of(small_config().model)
    plain, shared = (
        memory_of_rank(config, layout_of(config, 4), sizes)
        for config in (small_config(parallel={"data": data, "expert": 2}) for data in ("replicate", "zero1"))
    )
    assert plain.moments == 2 * plain.weights and shared.weights == plain.weights
    assert shared.moments < 0.6 * plain.moments
