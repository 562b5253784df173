"""Options of attention, several in one model: every layout makes the step of one process, and mistakes show."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from moe_dist.config import Config, ModelConfig
from moe_dist.parallel import collectives, tensor
from tests.support.attention import ATTENTION
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step
from tests.support.tolerances import RELATIVE
from tests.verify import patches

TOLERANCE = RELATIVE[torch.float64]
RANKS, ROWS = 4, 5
SEPARATE = {"norms of the whole, biases, sinks, windows, yarn"}  # documents that do not see each other
# tensor, expert, what ranks keep, recompute
LAYOUTS = [
    (2, 1, "replicate", "none"),
    (1, 2, "replicate", "selective"),
    (2, 2, "replicate", "full"),
    (2, 2, "fsdp", "selective"),
    (1, 2, "fsdp", "full"),
    (2, 4, "zero1", "selective"),
]
WHOLE, _, LATENT, _ = ATTENTION
MISTAKEN = (2, 2, "replicate", "none")


def config_of(name: str, layout: tuple[int, int, str, str]) -> Config:
    cut, expert, data, recompute = layout
    model = {"num_layers": 3, "num_dense_layers": 1, **ATTENTION[name]}
    return small_config(
        {"balance_loss": 0.2},
        model=model,
        data={"documents": "separate"} if name in SEPARATE else {},
        parallel={"tensor": cut, "expert": expert, "data": data},
        train={"global_batch_sequences": ROWS, "micro_batch_sequences": 2, "recompute": recompute},
    )


def rows() -> Tensor:
    """Rows of several documents; 0 ends one."""
    some = random_rows(ROWS)
    return some.where(torch.rand(some.shape, generator=torch.Generator().manual_seed(2)) > 0.2, 0)


def drawn(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """First weights of which none is 0 or 1 by definition, so that what they do shows in the forward pass."""
    seeded = int.from_bytes(hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=7).digest(), "little")
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seeded))
    return 1 + 0.2 * value if name.endswith("norm.weight") else 0.3 * value


def first_weights_drawn() -> AbstractContextManager[Any]:
    return mock.patch("moe_dist.model.init.initial_value", drawn)


def share_of(cut: int) -> list[Tensor]:
    return list(rows().tensor_split(RANKS // cut))


MISTAKES: dict[str, tuple[Any, str, str]] = {
    "the output's bias on every tensor rank": (
        lambda: mock.patch.object(tensor.PartialLinear, "forward", nn.Linear.forward),
        "routing",
        WHOLE,
    ),
    "norms of the channels here": (
        lambda: mock.patch.object(tensor, "summed", lambda value, group: value * group.size()),
        "routing",
        WHOLE,
    ),
    "the way down to latents summed over the data ranks alone": (
        lambda: patches.summed_over("data", lambda name: "kv_down" in name),
        "gradient of blocks.0.attention.kv_down.weight",
        LATENT,
    ),
    "the gradient of a sum of squares left here": (
        lambda: mock.patch.object(collectives._Sum, "backward", lambda ctx, grad: (grad, None)),
        "gradient",
        WHOLE,
    ),
}


def steps_of_rank(rank: int) -> dict[Any, StepProof]:
    found: dict[Any, StepProof] = {}
    with first_weights_drawn():
        for name in ATTENTION:
            for layout in LAYOUTS:
                found[name, layout] = candidate_step(rank, config_of(name, layout), layout[1], share_of(layout[0]))
        for mistake, (plant, _, name) in MISTAKES.items():
            with plant():
                config = config_of(name, MISTAKEN)
                found[mistake] = candidate_step(rank, config, MISTAKEN[1], share_of(MISTAKEN[0]))
    return found


@cache
def steps() -> list[dict[Any, StepProof]]:
    return run_gang(steps_of_rank, RANKS, timeout_seconds=200)


@cache
def expected_of(name: str) -> StepProof:
    with first_weights_drawn():
        return oracle_step(config_of(name, LAYOUTS[0]), rows())


@pytest.mark.parametrize("name", ATTENTION)
def test_every_layout_makes_the_step_of_one_process(name):
    for layout in LAYOUTS:
        difference = first_difference([found[name, layout] for found in steps()], expected_of(name), TOLERANCE)
        assert difference is None, f"tensor, expert, data, recompute {layout}: {difference}"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_seen(mistake):
    _, words, name = MISTAKES[mistake]
    difference = first_difference([found[mistake] for found in steps()], expected_of(name), TOLERANCE)
    assert difference is not None and words in difference, difference
