"""A rank that becomes three times slower in its own work is named within twenty steps; clean runs name none."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.train.account import read_events
from moe_dist.train.straggler import Straggler
from tests.support.gang import run_gang
from tests.support.models import small_config
from tests.support.small_runs import open_trainer, run_to_the_end

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "experts apart": (2, {}),
    "every rank all experts": (1, {"overlap_gradients": True}),
    "tensor": (1, {"tensor": 2}),
}
SLOW_FROM, SLOW_TO, STEPS = 60, 100, 140


def run(rank: int, folder: str, name: str, steps: int, slows: bool) -> list[dict[str, Any]]:
    """The alarms of a run in which rank 1 sleeps in its forward pass, twice as long as it usually works for a step."""
    degree, parallel = LAYOUTS[name]
    config = small_config(
        model={"num_heads": 2, "num_kv_heads": 2, "num_layers": 1},
        train={"steps": steps, "precision": "fp32", "global_batch_sequences": 8, "checks": "off"},
        parallel=parallel,
        run={"dir": f"{folder}/{name}-{steps}"},
        checkpoint={"every_steps": 100_000},
        generate={"prompts": []},
    )
    trainer = open_trainer(config, degree)
    watch, own = trainer._watch, list[float]()

    def note(figures: Any) -> None:
        watch(figures)
        own.append(figures.own_seconds[1])

    def sleep(module: Any, given: Any, out: Any) -> None:
        if slows and rank == 1 and SLOW_FROM <= trainer.step < SLOW_TO and out.requires_grad:
            time.sleep(2 * max(statistics.median(own[10:SLOW_FROM]), 0.01))

    trainer._watch = note  # type: ignore[method-assign]
    trainer.trainee.model.embedding.register_forward_hook(sleep)
    found = run_to_the_end(trainer)
    assert found.get("status") == "finished", found["fault"]
    assert len(own) == steps and own[0] == 0 and min(own[1:]) > 0
    events = read_events(Path(config.run.dir) / "progress.jsonl") if rank == 0 else []
    return [event for event in events if event["event"] == "alarm" and event["kind"].startswith("straggler")]


def slowed(rank: int, folder: str) -> dict[str, Any]:
    return {name: run(rank, folder, name, STEPS, slows=True) for name in LAYOUTS}


def clean(rank: int, folder: str) -> list[dict[str, Any]]:
    return run(rank, folder, "experts apart", 1000, slows=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_gang(slowed, 2, str(tmp_path_factory.mktemp("runs")))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_rank_that_becomes_three_times_slower_is_named_within_twenty_steps(found, name):
    told = [(alarm["kind"], alarm["rank"]) for alarm in found[name]]
    assert told == [("straggler", 1), ("straggler_recovered", 1)], found[name]
    slow, again = found[name]
    assert SLOW_FROM < slow["step"] <= SLOW_FROM + 20 and SLOW_TO < again["step"] <= SLOW_TO + 20
    assert "rank 1" in slow["text"] and slow["seconds"] > 2 * slow["others"]


@pytest.mark.slow
def test_thousand_real_clean_steps_name_no_rank(tmp_path):
    assert run_gang(clean, 2, str(tmp_path), timeout_seconds=280)[0] == []


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_thousand_noisy_steps_name_no_rank_and_a_slow_one_is_named(ranks):
    """Steps of 100 ms with the noise of a shared machine: a tenth of them three to ten times as long, on any rank."""
    draw, straggler = torch.Generator().manual_seed(ranks), Straggler(2.0)
    for step in range(1, 1001):
        usual = 0.1 * (1 + 0.2 * torch.rand(ranks, generator=draw))
        disturbed = torch.rand(ranks, generator=draw) < 0.1
        taken = torch.where(disturbed, usual * (3 + 7 * torch.rand(ranks, generator=draw)), usual)
        assert list(straggler.see(step, taken.tolist())) == []
    told = []
    for step in range(1001, 1041):
        taken = 0.1 * (1 + 0.2 * torch.rand(ranks, generator=draw))
        taken[ranks - 1] *= 3
        told += list(straggler.see(step, taken.tolist()))
    assert [(alarm["kind"], alarm["rank"]) for alarm in told] == [("straggler", ranks - 1)]
    assert told[0]["step"] <= 1020


def test_times_that_are_not_known_or_of_one_rank_name_none():
    for seconds in ([0.0, 1.0], [1.0], []):
        straggler = Straggler(2.0)
        assert [alarm for step in range(100) for alarm in straggler.see(step, seconds)] == []
    assert [alarm for step in range(100) for alarm in Straggler(None).see(step, [0.1, 9.0])] == []
