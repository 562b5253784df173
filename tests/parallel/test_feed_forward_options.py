"""Options of feed-forwards, experts, norms and positions: every layout makes the step of one process."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from moe_dist.config import Config
from moe_dist.model.feed_forward import FeedForward
from moe_dist.moe.experts import Experts
from moe_dist.parallel import tensor
from moe_dist.parallel.expert_tensor import CutExperts
from moe_dist.parallel.tensor import SharedTokens
from tests.parallel.test_attention_options import first_weights_drawn, rows, share_of
from tests.support.feed_forward import FEED_FORWARD, MIX
from tests.support.gang import run_gang
from tests.support.models import small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step
from tests.support.tolerances import RELATIVE

TOLERANCE = RELATIVE[torch.float64]
RANKS, ROWS = 4, 5
# tensor, expert, expert-tensor, what ranks keep, recompute
LAYOUTS = [
    (2, 1, 1, "replicate", "none"),
    (1, 2, 2, "replicate", "selective"),
    (2, 2, 2, "replicate", "full"),
    (2, 4, 1, "zero1", "none"),
    (2, 2, 1, "fsdp", "selective"),
    (1, 1, 4, "replicate", "none"),
]
CUT = LAYOUTS[1]
BIASED, MIXED = list(FEED_FORWARD)[1], next(iter(MIX))


def config_of(name: str, layout: tuple[int, int, int, str, str]) -> Config:
    tensor, expert, cut, data, recompute = layout
    case = FEED_FORWARD[name]
    return small_config(
        {"balance_loss": 0.2, "expert_width": 12, **case.get("moe", {})},
        model=case["model"],
        data=case.get("data", {}),
        parallel={"tensor": tensor, "expert": expert, "expert_tensor": cut, "data": data},
        train={"global_batch_sequences": ROWS, "micro_batch_sequences": 2, "recompute": recompute},
    )


def bias_on_every_rank(self: CutExperts, kind: torch.dtype) -> Any:
    """What a cut expert must not do: all ranks of its group add the last bias."""
    found = Experts.biases(self, kind)
    assert found is not None
    return found[0], F.pad(found[1], (0, self.down.shape[2] - found[1].shape[1]))


def run_of_tokens_alone(shared: FeedForward, group: Any) -> None:
    """What a shared expert with a mix must not do: begin at the first of the tokens here."""

    def before(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        (x_1tD, places), position_T = given, given[1].position_BS.flatten()
        return x_1tD, places._replace(position_BS=position_T[SharedTokens(group).here(len(position_T))][None])

    shared.register_forward_pre_hook(before)


def steps_of_rank(rank: int) -> dict[Any, StepProof]:
    found: dict[Any, StepProof] = {}
    with first_weights_drawn():
        for name in FEED_FORWARD:
            for layout in LAYOUTS:
                found[name, layout] = candidate_step(rank, config_of(name, layout), layout[1], share_of(layout[0]))
        with mock.patch.object(CutExperts, "biases", bias_on_every_rank):
            found["mistake"] = candidate_step(rank, config_of(BIASED, CUT), CUT[1], share_of(CUT[0]))
        with mock.patch.object(tensor, "_tell_tokens_before", run_of_tokens_alone):
            found["alone"] = candidate_step(rank, config_of(MIXED, LAYOUTS[0]), 1, share_of(2))
    return found


@cache
def steps() -> list[dict[Any, StepProof]]:
    return run_gang(steps_of_rank, RANKS, timeout_seconds=200)


@cache
def expected_of(name: str) -> StepProof:
    with first_weights_drawn():
        return oracle_step(config_of(name, LAYOUTS[0]), rows())


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_every_layout_makes_the_step_of_one_process(name):
    for layout in LAYOUTS:
        difference = first_difference([found[name, layout] for found in steps()], expected_of(name), TOLERANCE)
        assert difference is None, f"tensor, expert, expert-tensor, data, recompute {layout}: {difference}"


def test_bias_added_at_the_wrong_channels_is_seen():
    assert first_difference([found["mistake"] for found in steps()], expected_of(BIASED), TOLERANCE) is not None


def test_shared_expert_that_does_not_know_the_tokens_before_its_own_is_seen():
    difference = first_difference([found["alone"] for found in steps()], expected_of(MIXED), TOLERANCE)
    assert difference is not None and "cross_entropy" in difference, difference
