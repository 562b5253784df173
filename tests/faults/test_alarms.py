"""Alarms: silent over a thousand clean steps, and told when a loss jumps or experts collapse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.moe.balance import max_violation
from moe_dist.optim import build_adamw
from moe_dist.train.alarms import Alarms, ExpertLoad, LossSpike
from moe_dist.train.step import StepFigures, Trainee, train_step
from tests.support.models import LENGTH, random_rows, small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import parallel_trainee

ROWS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and lose much where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def falling_losses(seed: int, steps: int = 1000) -> list[float]:
    """A loss that falls fast, then slowly, with the noise of batches, which is twice as large in one of fifty."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, generator=draw).tolist()
    harder = (torch.rand(steps, generator=draw) < 0.02).tolist()
    return [2.0 + 5.0 * math.exp(-step / 60) + 0.05 * noise[step] * (1 + harder[step]) for step in range(steps)]


def alarms_of(losses: list[float]) -> list[dict[str, Any]]:
    watch = small_config().watch
    spike = LossSpike(watch.spike_window_steps, watch.spike_deviations)
    return [dict(alarm) for step, loss in enumerate(losses, start=1) for alarm in spike.see(step, loss)]


@pytest.mark.parametrize("seed", range(20))
def test_loss_of_a_clean_run_is_no_alarm_and_a_spike_is_one(seed):
    losses = falling_losses(seed)
    assert alarms_of(losses) == []
    for step in (200, 900):
        losses[step - 1 : step + 4] = [losses[step - 1] * 1.8] * 5
    found = alarms_of(losses)
    assert [alarm["step"] for alarm in found] == [200, 900]
    for alarm in found:
        low, high = alarm["expected"]
        assert low < losses[alarm["step"] - 2] < high < alarm["loss"]
        assert f"step {alarm['step']}" in alarm["text"]


def test_losses_that_are_not_finite_and_a_window_of_none_are_no_alarm():
    assert alarms_of([2.0, math.nan, math.inf] * 30) == []
    assert list(LossSpike(0, 8.0).see(1, 1e9)) == []


def test_loss_that_is_flat_but_for_rounding_is_no_alarm():
    """Its deviation is zero: then one hundredth of the loss takes its place."""
    assert alarms_of([2.0] * 100 + [2.0001] * 100) == []
    assert len(alarms_of([2.0] * 100 + [2.5])) == 1


def learnable_rows(step: int) -> Tensor:
    """Each token follows from the one before, but for one in ten."""
    draw = torch.Generator().manual_seed(step)
    rows = torch.randint(0, 40, (ROWS, LENGTH + 1), generator=draw)
    wild = torch.rand(ROWS, LENGTH + 1, generator=draw) < 0.1
    for place in range(1, LENGTH + 1):
        rows[:, place] = torch.where(wild[:, place], rows[:, place], (3 * rows[:, place - 1] + 1) % 40)
    return rows


def toy(moe: dict[str, Any], steps: int, **sections: Any) -> Config:
    train = {"steps": steps, "precision": "fp32", "global_batch_sequences": ROWS, "checks": "light"}
    return small_config(moe, train=train, optimizer={"lr": 0.01, "warmup_steps": 10}, **sections)


def test_thousand_real_steps_give_no_alarm_and_a_batch_of_noise_gives_one():
    with one_rank():
        config = toy({}, 1010, model={"num_layers": 1})
        trainee = parallel_trainee(config, 1)
        trainee = replace(trainee, optimizer=build_adamw(trainee.model, config.optimizer))
        told, figures = train_for(trainee, 1008, noise_at=1004)
    assert figures[900].loss < 0.7 * figures[0].loss
    assert [(alarm["kind"], alarm["step"]) for alarm in told] == [("loss_spike", 1005)], told
    assert told[0]["expected"][1] < told[0]["loss"] == figures[1004].loss


BALANCED = {"router": "sigmoid_topk", "selection_bias": True, "bias_update_rate": 0.01, "balance_loss": 0.0}


def collapsed(config: Config) -> Trainee:
    """A model whose router of the second layer sends every token to experts 2 and 5."""
    trainee = parallel_trainee(config, 1)
    trainee = Trainee(
        config, trainee.mesh, trainee.model, trainee.gradients, build_adamw(trainee.model, config.optimizer)
    )
    model, layers = trainee.model, [layer for _, layer in trainee.model.moe_layers()]
    with torch.no_grad():
        model.embedding.weight += 2.0 * torch.ones(model.embedding.weight.shape[1]).sign()
        layers[1].router.weight[[2, 5]] = 0.3  # along what all tokens now have in common
    return trainee


def train_for(
    trainee: Trainee, steps: int, noise_at: int | None = None
) -> tuple[list[dict[str, Any]], list[StepFigures]]:
    alarms, told, figures = Alarms(trainee.config), [], []
    for step in range(steps):
        rows = random_rows(ROWS, seed=7) if step == noise_at else learnable_rows(step)
        figures.append(train_step(trainee, rows, step))
        told += [dict(alarm) for alarm in alarms.see(step + 1, figures[-1].loss, figures[-1].demand)]
    return told, figures


def test_collapsed_router_is_told_and_the_selection_bias_recovers_it_within_200_steps():
    with one_rank():
        told, figures = train_for(collapsed(toy(BALANCED, 200)), 200)
        for figure in figures[:3]:
            assert figure.demand[1].topk(2).indices.sort().values.tolist() == [2, 5]
            assert figure.demand[1][[2, 5]].tolist() == [ROWS * LENGTH] * 2
        first = next(alarm for alarm in told if alarm["layer"] == 1)
        assert (first["kind"], first["layer"], first["step"]) == ("expert_load", 1, 20)
        assert first["overfull"] == [2, 5]
        assert len(first["dead"]) >= 4 and not {2, 5} & set(first["dead"])  # the bias has begun its work by then
        assert "layer 1" in first["text"] and "[2, 5]" in first["text"]
        last = [alarm for alarm in told if alarm["layer"] == 1][-1]
        assert last["kind"] == "expert_load_recovered" and last["step"] <= 200
        load = torch.stack([figure.demand[1] for figure in figures[-20:]]).sum(0)
        assert max_violation(load) < 1.0 and int(load.min()) > 0


def test_collapsed_router_without_balancing_stays_so_and_is_told_once():
    with one_rank():
        frozen = {**BALANCED, "selection_bias": False}
        told, figures = train_for(collapsed(toy(frozen, 60)), 60)
    alarms = [alarm for alarm in told if alarm["layer"] == 1]
    assert alarms and alarms[0]["kind"] == "expert_load"
    assert not [alarm for alarm in alarms if alarm["kind"] == "expert_load_recovered"]
    assert int(figures[-1].demand[1].topk(2).values.sum()) > ROWS * LENGTH


def test_one_dead_expert_among_many_is_named_and_chance_is_not():
    load = ExpertLoad(20, 2, [3])
    draw = torch.Generator().manual_seed(0)
    for step in range(1, 1001):
        demand = torch.multinomial(torch.ones(64), 300, replacement=True, generator=draw).bincount(minlength=64)
        assert list(load.see(step, demand[None])) == []
    told = []
    for step in range(1001, 1031):
        chance = torch.ones(64)
        chance[17] = 0
        demand = torch.multinomial(chance, 300, replacement=True, generator=draw).bincount(minlength=64)
        told += [dict(alarm) for alarm in load.see(step, demand[None])]
    assert [(alarm["layer"], alarm["dead"], alarm["overfull"]) for alarm in told] == [(3, [17], [])]
    assert told[0]["step"] <= 1020


def test_losses_of_before_a_restart_say_what_is_usual_after_it():
    alarms = Alarms(toy({}, 100))
    alarms.remember(
        [{"step": step, "loss": 2.0 + 0.01 * (step % 3)} for step in range(1, 101)] + [{"step": 101, "loss": None}]
    )
    even = torch.full((2, 8), 5)
    assert [alarm["kind"] for alarm in alarms.see(102, 4.0, even)] == ["loss_spike"]
