"""Padding and separate documents in steps of several ranks: those of one process, however unequal ranks are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.errors import CheckpointError, TrainingFault
from moe_dist.objectives.micro_batch import PADDING
from moe_dist.train.evaluate import Evaluation, HeldOut, evaluate
from moe_dist.train.loop import Trainer
from moe_dist.train.metrics import Recorder
from moe_dist.train.step import train_step
from tests.support.gang import run_gang
from tests.support.models import LENGTH, VOCAB, random_rows, small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step, parallel_trainee
from tests.support.tolerances import RELATIVE

ROWS, RANKS = 6, 2
DROPS = {"capacity_factor": 0.75, "balance_scope": "global", "selection_bias": True}
# name: mixture of experts, parallel, training, documents
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "copies, separate": ({}, {"expert": 1}, {}, "separate"),
    "experts shared out, drops": (DROPS, {"expert": 2}, {"recompute": "full"}, "joined"),
    "experts shared out, separate": (DROPS, {"expert": 2, "dispatch": "deduplicated"}, {}, "separate"),
    "tensors cut, separate": (DROPS, {"tensor": 2, "expert": 2}, {"recompute": "selective"}, "separate"),
    "tensors cut, computed again": ({}, {"tensor": 2, "expert": 1}, {"recompute": "full"}, "separate"),
    "experts cut, padded to capacity": (
        {"capacity_factor": 1.0, "capacity_factor_eval": 1.0, "pad_to_capacity": True},
        {"expert": 1, "expert_tensor": 2},
        {},
        "joined",
    ),
    "parameters shared out": ({}, {"expert": 1, "data": "fsdp"}, {"recompute": "full"}, "separate"),
}


def config_of(case: str) -> Config:
    moe, parallel, train, documents = CASES[case]
    train = {"global_batch_sequences": ROWS, "micro_batch_sequences": 2, "loss_chunk_tokens": 7, **train}
    model = {"num_heads": 4, "num_kv_heads": 2, "num_dense_layers": 1}
    moe = {"balance_loss": 0.2, "z_loss": 0.01, **moe}
    return small_config(moe, model=model, parallel=parallel, train=train, data={"documents": documents})


def padded_rows() -> Tensor:
    """Rows of several documents and unequal length; the last half, which is the second rank's, is all padding."""
    rows = random_rows(ROWS)
    rows[:, 4] = rows[:, 9] = 0
    for row, kept in enumerate((LENGTH + 1, 8, 2, 0, 0, 0)):
        rows[row, kept:] = PADDING
    return rows


def shares_of(tensor: int) -> list[Tensor]:
    return list(padded_rows().chunk(RANKS // tensor))


def scored(case: str, rank: int) -> Evaluation:
    config = config_of(case)
    trainee = parallel_trainee(config, config.parallel.expert or 1)
    shares = shares_of(config.parallel.tensor)
    return evaluate(trainee, HeldOut(shares[trainee.mesh.data_place], len(shares[0]), torch.arange(VOCAB)))


def empty_step(rank: int) -> str:
    with pytest.raises(TrainingFault) as caught:
        train_step(parallel_trainee(config_of("copies, separate"), 1), torch.full((2, LENGTH + 1), PADDING), 0)
    return str(caught.value)


def steps_of_rank(rank: int) -> tuple[dict[str, StepProof], Evaluation, str]:
    steps = {}
    for case in CASES:
        config = config_of(case)
        steps[case] = candidate_step(rank, config, config.parallel.expert or 1, shares_of(config.parallel.tensor))
    return steps, scored("experts shared out, separate", rank), empty_step(rank)


@cache
def found_by_ranks() -> list[tuple[dict[str, StepProof], Evaluation, str]]:
    return run_gang(steps_of_rank, RANKS)


@pytest.mark.parametrize("case", CASES)
def test_padded_step_of_ranks_that_hold_unequal_padding_is_that_of_one_process(case):
    expected = oracle_step(config_of(case), padded_rows())
    difference = first_difference([steps[case] for steps, *_ in found_by_ranks()], expected, RELATIVE[torch.float64])
    assert difference is None, difference


def test_evaluation_of_padded_rows_is_that_of_the_rows_without_padding():
    config = config_of("experts shared out, separate")
    alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"expert": 1})})
    nats = tokens = text_bytes = 0.0
    with one_rank():
        trainee = parallel_trainee(alone, 1)
        for row in padded_rows()[:3]:
            kept = row[row >= 0][None]
            part = evaluate(replace(trainee, end_of_text=0), HeldOut(kept, 1, torch.ones(VOCAB, dtype=torch.int64)))
            count = kept.shape[1] - 1
            nats, tokens, text_bytes = nats + part.loss * count, tokens + count, text_bytes + int(kept[0, 1:].sum())
    for _, found, _ in found_by_ranks():
        assert found.loss == pytest.approx(nats / tokens, rel=1e-10)
        assert found.bits_per_byte == pytest.approx(nats / torch.log(torch.tensor(2.0)).item() / text_bytes, rel=1e-6)


class Rows:
    """Batches that are the same at every step."""

    def __next__(self) -> Tensor:
        return padded_rows()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def trainer_in(folder: Path, documents: str) -> Trainer:
    config = small_config(run={"dir": str(folder)}, data={"documents": documents})
    recorder = Recorder(folder, True, flops_per_token=1e3, peak_flops=1e9)
    recorder.open(0, 8, [])
    held_out = HeldOut(padded_rows(), ROWS, torch.ones(VOCAB, dtype=torch.int64))
    return Trainer(parallel_trainee(config, 1, optimizer="adamw"), Rows(), held_out, recorder)


def test_run_does_not_go_on_with_documents_that_see_each_other_where_they_did_not(tmp_path):
    with one_rank():
        trainer = trainer_in(tmp_path, "separate")
        train_step(trainer.trainee, padded_rows(), 0)
        trainer.save()
        assert trainer_in(tmp_path, "separate").restore() is not None
        with pytest.raises(CheckpointError) as caught:
            trainer_in(tmp_path, "joined").restore()
    assert caught.value.value == "data.documents=joined" and "data.documents=separate" in caught.value.rule


def test_step_without_a_token_that_counts_is_refused_on_every_rank():
    faults = {fault for *_, fault in found_by_ranks()}
    assert len(faults) == 1 and "no token that counts" in faults.pop()
