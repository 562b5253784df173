"""One bit of one weight flips in the memory of one rank: the comparison of copies names it within its interval."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_dist.parallel.fsdp import local
from moe_dist.train.loop import Trainer
from tests.support.gang import run_gang
from tests.support.models import small_config
from tests.support.small_runs import open_trainer, run_to_the_end

EVERY, FLIP_AFTER = 5, 7
DENSE, EXPERT = "blocks.1.attention.query.weight", "blocks.0.feed_forward.experts.down"
# Name: (expert degree, parallel, tensor, rank that flips, what is said of the ranks).
FLIPS: dict[str, tuple[int, dict[str, Any], str, int, str]] = {
    "a weight that all ranks copy": (1, {}, DENSE, 2, "most copies agree, so ranks [2] are wrong"),
    "an expert that all ranks copy": (1, {}, EXPERT, 0, "most copies agree, so ranks [0] are wrong"),
    "an expert that two ranks copy": (2, {}, EXPERT, 3, "which of ranks [1, 3] are wrong"),
    "a dense weight beside experts apart": (4, {}, DENSE, 1, "most copies agree, so ranks [1] are wrong"),
    "part of a weight that two ranks copy": (1, {"tensor": 2}, DENSE, 2, "which of ranks [0, 2] are wrong"),
    "a sharded weight that two ranks copy": (
        1,
        {"data": "fsdp", "data_shard": 2},
        DENSE,
        1,
        "of ranks [1, 3] are wrong",
    ),
}


def flip_one_bit(trainer: Trainer, tensor: str) -> None:
    """The lowest bit of a mantissa."""
    words = local(trainer.trainee.model.get_parameter(tensor)).data.view(-1).view(torch.int32)
    words[len(words) // 2] ^= 1


def run_with_flip(rank: int, folder: str, name: str, checks: str) -> dict[str, Any]:
    degree, parallel, tensor, flips, _ = FLIPS[name]
    train = {"steps": 12, "precision": "fp32", "global_batch_sequences": 8, "checks": checks}
    config = small_config(
        model={"num_heads": 4, "num_kv_heads": 2},
        train={**train, "checks_every_steps": EVERY},
        parallel=parallel,
        optimizer={"lr": 0.01, "warmup_steps": 2},
        run={"dir": f"{folder}/{name}-{checks}"},
        checkpoint={"every_steps": 100},
        generate={"prompts": []},
    )
    trainer = open_trainer(config, degree)
    watch = trainer._watch

    def flip(figures: Any) -> None:
        watch(figures)
        if trainer.step == FLIP_AFTER and rank == flips:
            flip_one_bit(trainer, tensor)

    trainer._watch = flip  # type: ignore[method-assign]
    found = run_to_the_end(trainer)
    return {"fault": found.get("fault"), "step": found["step"], "status": found.get("status")}


def everything(rank: int, folder: str) -> dict[str, Any]:
    found = {name: run_with_flip(rank, folder, name, "light") for name in FLIPS}
    return found | {"off": run_with_flip(rank, folder, next(iter(FLIPS)), "off")}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_gang(everything, 4, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("name", FLIPS)
def test_flipped_bit_is_named_with_its_ranks_within_the_interval(found, name):
    _, _, tensor, _, says = FLIPS[name]
    faults = {result[name]["fault"] for result in found}
    ((kind, text),) = faults
    assert kind == "TrainingFault" and f"step {FLIP_AFTER // EVERY * EVERY + EVERY}, {tensor}" in text
    assert says in text
    assert {result[name]["step"] for result in found} == {10}


def test_flipped_bit_is_not_seen_where_checks_are_off(found):
    assert {(result["off"]["fault"], result["off"]["status"]) for result in found} == {(None, "finished")}
