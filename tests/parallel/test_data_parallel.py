"""Data parallelism: sums beside the backward pass make the step of one process, and the same bits as sums after it; so
does an optimizer whose state is shared out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fairscale.optim.oss import OSS
from torch import Tensor

from moe_dist.config import Config
from moe_dist.optim import learning_rate
from moe_dist.parallel import buckets as buckets_module
from moe_dist.parallel.buckets import Bucket, Buckets
from moe_dist.parallel.zero import state_holders
from moe_dist.train.step import Trainee, train_step
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step, parallel_trainee
from tests.support.tolerances import RELATIVE

TOLERANCE = RELATIVE[torch.float64]
SMALL_BUCKET = 4_000  # bytes: the small model has a dozen such buckets

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, dense first layer": {"model": {"tie_embeddings": False, "num_dense_layers": 1}},
    "hash router": {"moe": {"router": "hash", "balance_loss": 0.0, "z_loss": 0.0}},
    "micro-batches of one": {"train": {"micro_batch_sequences": 1}},
}
LAYOUTS = {2: [1, 2], 3: [1, 3], 4: [2]}  # ranks: expert degrees; eight experts over three ranks are 2, 3, 3
Case = tuple[str, int, int]  # model, expert degree, rows


def config_of(model: str, rows: int, **parallel: Any) -> Config:
    options = MODELS[model]
    train = {
        "global_batch_sequences": rows,
        "micro_batch_sequences": rows,
        "clip_norm": 0.5,
        **options.get("train", {}),
    }
    return small_config(options.get("moe"), model=options.get("model", {}), train=train, parallel=parallel)


def cases_of(ranks: int) -> list[Case]:
    """One row leaves ranks with an empty batch; seven rows make ranks unequal."""
    return [(model, degree, rows) for model in MODELS for degree in LAYOUTS[ranks] for rows in (1, 7)]


def step_of(rank: int, ranks: int, case: Case, **parallel: Any) -> StepProof:
    model, degree, count = case
    rows = random_rows(count)
    parts = [rows[count * r // ranks : count * (r + 1) // ranks] for r in range(ranks)]
    return candidate_step(rank, config_of(model, count, **parallel), degree, parts)


@cache
def expected_of(model: str, rows: int) -> StepProof:
    return oracle_step(config_of(model, rows), random_rows(rows))


def gang(rank: int, ranks: int) -> dict[Any, Any]:
    """Everything that one rank of a gang does, by what it is."""
    with mock.patch.object(buckets_module, "BUCKET_BYTES", SMALL_BUCKET):
        found: dict[Any, Any] = {}
        for case in cases_of(ranks):
            found["overlapped", case], found["started", case] = overlapped(rank, ranks, case)
            found["blocking", case] = step_of(rank, ranks, case)
        for name, mistake in mistakes().items():
            with mistake:
                found["planted", name] = step_of(rank, ranks, ("tied", 1, 7), overlap_gradients=True)
        for degree in LAYOUTS[ranks]:
            for rows in (1, 7):
                found["updates", degree, rows] = updates(rank, ranks, degree, rows)
        found["announced too early"] = announced_too_early(rank, ranks)
    return found


def overlapped(rank: int, ranks: int, case: Case) -> tuple[StepProof, tuple[int, int]]:
    """The step, and how many of its buckets had been started at the end of the backward pass."""
    seen: list[tuple[int, int]] = []
    finish = Buckets.finish

    def watched(self: Buckets) -> None:
        seen.append((self.started, len(self.buckets)))
        finish(self)

    with mock.patch.object(Buckets, "finish", watched):
        proof = step_of(rank, ranks, case, overlap_gradients=True)
    return proof, seen[0]


def mistakes() -> dict[str, Any]:
    """Patches by what is wrong with them."""
    start = Bucket.start

    def mean(self: Bucket) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.div_(dist.get_world_size(self.group))
        start(self)

    def skips_experts(self: Bucket) -> None:
        if any(parameter.ndim == 3 for parameter in self.parameters):
            self.work = mock.Mock()
        else:
            start(self)

    return {
        "none": mock.patch.object(Bucket, "start", start),
        "mean instead of sum": mock.patch.object(Bucket, "start", mean),
        "a bucket skipped": mock.patch.object(Bucket, "start", skips_experts),
    }


def announced_too_early(rank: int, ranks: int) -> str:
    """What is said where the first of several backward passes is taken for the last."""
    trainee = parallel_trainee(config_of("tied", ranks, overlap_gradients=True), 1)
    trainee.gradients.expect_last()
    for _ in range(2):
        hidden, _ = trainee.model(random_rows(1)[:, :-1])
        try:
            hidden.sum().backward()
        except AssertionError as error:
            return str(error)
    return "nothing"


@dataclass(frozen=True)
class Updates:
    """Weights after three updates of AdamW, by how the optimizer's state is kept, and what of it is here."""

    weights: dict[str, dict[str, Tensor]]
    held: set[str]
    rates: set[float]


def updates(rank: int, ranks: int, degree: int, count: int) -> Updates:
    weights, held, rates = {}, set(), set()
    for way in ("replicate", "zero1", "fairscale"):
        config = config_of("tied", count, data="zero1" if way == "zero1" else "replicate")
        trainee = parallel_trainee(config, degree, optimizer="adamw")
        if way == "fairscale":
            trainee = replace(trainee, optimizer=Pair(trainee))
        for step in range(3):
            rows = random_rows(count, seed=step)
            train_step(trainee, rows[count * rank // ranks : count * (rank + 1) // ranks], step)
        weights[way] = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
        if way == "zero1":
            names = {p: name for name, p in trainee.model.named_parameters()}
            held = {names[p] for holder in state_holders(trainee.optimizer) for p in holder.state}
            rates = {group["lr"] for holder in state_holders(trainee.optimizer) for group in holder.param_groups}
    return Updates(weights, held, rates)


class Pair(torch.optim.Optimizer):
    """fairscale's OSS twice: over the ranks that share dense parameters, and over those that share experts."""

    def __init__(self, trainee: Trainee) -> None:
        names = {p: name for name, p in trainee.model.named_parameters()}
        self.parts = []
        for experts, group in ((False, trainee.mesh.world), (True, trainee.mesh.expert_data)):
            groups = [
                {**given, "params": [p for p in given["params"] if (".experts." in names[p]) == experts]}
                for given in trainee.optimizer.param_groups
            ]
            self.parts.append(OSS([g for g in groups if g["params"]], optim=torch.optim.AdamW, group=group))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


@cache
def found_by(ranks: int) -> list[dict[Any, Any]]:
    return run_gang(gang, ranks, ranks)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_sums_beside_the_backward_pass_make_the_step_of_one_process(ranks):
    for case in cases_of(ranks):
        proofs = [found["overlapped", case] for found in found_by(ranks)]
        difference = first_difference(proofs, expected_of(case[0], case[2]), TOLERANCE)
        assert difference is None, f"{ranks} ranks, {case}: {difference}"


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_sums_beside_the_backward_pass_have_the_bits_of_sums_after_it(ranks):
    for case in cases_of(ranks):
        for found in found_by(ranks):
            one, other = found["overlapped", case], found["blocking", case]
            assert one.scalars == other.scalars
            for tensors, others in ((one.gradients, other.gradients), (one.weights, other.weights)):
                assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items()), case


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_rank_starts_every_bucket_in_the_backward_pass_empty_batches_too(ranks):
    for case in cases_of(ranks):
        counts = {found["started", case] for found in found_by(ranks)}
        assert len(counts) == 1, f"{case}: {counts}"
        started, buckets = counts.pop()
        assert started == buckets > 3, f"{case}: {started} of {buckets}"


@pytest.mark.parametrize("mistake", [name for name in mistakes() if name != "none"])
def test_planted_mistake_of_the_sums_is_caught(mistake):
    def told_of(name: str) -> str | None:
        proofs = [found["planted", name] for found in found_by(3)]
        return first_difference(proofs, expected_of("tied", 7), TOLERANCE)

    assert told_of("none") is None
    assert told_of(mistake) is not None


def test_a_pass_that_is_announced_too_early_is_not_summed_in_silence():
    assert all("came twice" in found["announced too early"] for found in found_by(2))


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_updates_by_shares_have_the_bits_of_whole_ones_and_of_fairscale(ranks):
    for degree in LAYOUTS[ranks]:
        for rows in (1, 7):
            for rank, found in enumerate(found_by(ranks)):
                weights = found["updates", degree, rows].weights
                for name, whole in weights["replicate"].items():
                    for way in ("zero1", "fairscale"):
                        assert torch.equal(weights[way][name], whole), f"rank {rank}, degree {degree}: {way}, {name}"


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_state_of_a_parameter_is_on_one_of_the_ranks_that_hold_it(ranks):
    config = config_of("tied", 7)
    for degree in LAYOUTS[ranks]:
        found = [result["updates", degree, 7] for result in found_by(ranks)]
        for name in found[0].weights["zero1"]:
            holders = sum(name in updates.held for updates in found)
            assert holders == (degree if ".experts." in name else 1), name
        assert all(updates.held for updates in found)
        assert {rate for updates in found for rate in updates.rates} == {learning_rate(2, 8, config.optimizer)}
