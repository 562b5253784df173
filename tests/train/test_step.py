"""Schedule, optimizer groups, accumulation, and runs that are stopped and continued."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from moe_dist.checkpoint import pieces
from moe_dist.config.schema import OptimizerConfig
from moe_dist.optim import build_adamw, learning_rate
from moe_dist.train.evaluate import HeldOut
from moe_dist.train.loop import Trainer
from moe_dist.train.metrics import Recorder
from moe_dist.train.step import micro_batches, train_step
from tests.support.gang import run_gang
from tests.support.models import VOCAB, plain_model, random_rows, small_config
from tests.support.parallel_step import parallel_trainee
from tests.support.tolerances import RELATIVE


def test_learning_rate_warms_up_and_ends_at_its_floor():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_fraction=0.1)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert rates[11] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine


def test_learning_rate_warm_up_longer_than_the_run_just_warms_up():
    config = OptimizerConfig(lr=1.0, warmup_steps=100)
    assert [learning_rate(step, 3, config) for step in range(3)] == [0.01, 0.02, 0.03]


def test_adamw_decays_matrices_and_experts_but_not_norms_and_embedding():
    config = small_config(optimizer={"weight_decay": 0.5})
    model = plain_model(config)
    decayed, others = build_adamw(model, config.optimizer).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0.0
    assert {names[id(p)] for p in others["params"]} == {
        name for name in names.values() if "norm" in name or name.startswith("embedding")
    }
    assert any("experts.down" in names[id(p)] for p in decayed["params"])


@pytest.mark.parametrize(("rows", "ranks", "micro"), [(6, 1, 2), (7, 2, 2), (1, 4, 1), (16, 3, 4)])
def test_micro_batches_every_rank_has_the_same_number(rows, ranks, micro):
    config = small_config(train={"global_batch_sequences": rows, "micro_batch_sequences": micro})
    counts, seen = set(), 0
    for rank in range(ranks):
        mine = random_rows(rows)[rows * rank // ranks : rows * (rank + 1) // ranks]
        parts = list(micro_batches(mine, config, ranks))
        counts.add(len(parts))
        seen += sum(len(part) for part in parts)
        assert max(len(part) for part in parts) <= micro
    assert len(counts) == 1 and seen == rows


class Rows:
    """Batches of a rank as a pure function of a cursor."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.cursor = rank, ranks, 0

    def __next__(self) -> torch.Tensor:
        rows = random_rows(6, seed=self.cursor)
        self.cursor += 1
        return rows[6 * self.rank // self.ranks : 6 * (self.rank + 1) // self.ranks]

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


def run_config(folder: str, precision: str = "fp32", data: str = "replicate"):
    return small_config(
        {"capacity_factor": 1.0},
        parallel={"data": data},
        run={"dir": folder},
        train={"steps": 6, "precision": precision, "micro_batch_sequences": 2},
        checkpoint={"every_steps": 2, "keep": 5},
        evaluate={"every_steps": 3},
        optimizer={"lr": 0.01, "warmup_steps": 2},
    )


def run_trainer(
    rank: int, folder: str, degree: int, ranks: int, stop_after: int = 100, data: str = "replicate"
) -> dict[str, Any]:
    """Trains in a run's directory, asked to stop after so many updates of this process."""
    trainee = parallel_trainee(run_config(folder, data=data), degree, optimizer="adamw")
    recorder = Recorder(Path(folder), rank == 0, flops_per_token=1e3, peak_flops=1e9)
    held_out = HeldOut(random_rows(4, seed=99), 4, torch.ones(VOCAB, dtype=torch.int64))
    trainer = Trainer(trainee, Rows(rank, ranks), held_out, recorder)
    trainer.restore()
    first = trainer.step
    recorder.open(first, 6, [])
    asked = iter(range(1000))
    status = trainer.run(lambda: rank == 0 and next(asked) >= stop_after - 1)
    trainer.close()
    recorder.close()
    weights = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    return {
        "status": status,
        "first": first,
        "rows": recorder.rows,
        "weights": weights,
        "evaluations": recorder.evaluations,
    }


def killed_before_the_first_save(rank: int, folder: str) -> dict[str, Any]:
    """A run that evaluates and then dies, and the same run started again: its record knows of the evaluation."""
    trainee = parallel_trainee(run_config(folder), 2, optimizer="adamw")
    recorder = Recorder(Path(folder), rank == 0, flops_per_token=1e3, peak_flops=1e9)
    trainer = Trainer(
        trainee, Rows(rank, 2), HeldOut(random_rows(4), 4, torch.ones(VOCAB, dtype=torch.int64)), recorder
    )
    recorder.open(0, 6, [])
    trainer.evaluate()
    return run_trainer(rank, folder, 2, 2)


def runs_of_two(rank: int, folder: str) -> dict[str, Any]:
    found = {
        "whole": run_trainer(rank, f"{folder}/whole", 2, 2),
        "again": run_trainer(rank, f"{folder}/again", 2, 2),
        "stopped": run_trainer(rank, f"{folder}/cut", 2, 2, stop_after=3),
        "continued": run_trainer(rank, f"{folder}/cut", 2, 2),
        "killed early": killed_before_the_first_save(rank, f"{folder}/early"),
        "other layout stopped": run_trainer(rank, f"{folder}/other", 1, 2, stop_after=3),
        "other layout continued": run_trainer(rank, f"{folder}/other", 2, 2),
    }
    return found


def equal_runs(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Bit for bit: every figure but times, and every weight."""
    untimed = ("seconds", "data_seconds", "tokens_per_second", "mfu")
    rows = [[{k: v for k, v in row.items() if k not in untimed} for row in run["rows"]] for run in (first, second)]
    return rows[0] == rows[1] and all(torch.equal(first["weights"][n], w) for n, w in second["weights"].items())


def test_run_stopped_and_continued_equals_one_never_stopped(tmp_path):
    for rank, found in enumerate(run_gang(runs_of_two, 2, str(tmp_path))):
        assert found["stopped"]["status"] == "interrupted" and found["continued"]["first"] == 3
        assert found["whole"]["status"] == found["continued"]["status"] == "finished"
        for other in ("again", "continued"):
            weights = found[other]["weights"]
            assert all(torch.equal(found["whole"]["weights"][n], w) for n, w in weights.items()), other
        if rank == 0:
            assert len(found["continued"]["rows"]) == 6
            assert equal_runs(found["whole"], found["again"])
            assert equal_runs(found["whole"], found["continued"])
            assert equal_runs(found["whole"], found["killed early"])
            assert sorted(found["whole"]["evaluations"]) == [0, 3, 6]
            assert found["continued"]["evaluations"] == found["whole"]["evaluations"]
            whole = [row["loss"] for row in found["whole"]["rows"]]
            for row, loss in zip(found["other layout continued"]["rows"], whole, strict=True):
                assert row["loss"] == pytest.approx(loss, rel=RELATIVE[torch.float32])


def runs_with_shared_state(rank: int, folder: str) -> dict[str, Any]:
    """Runs of two copies of everything, the optimizer's state whole or shared out, and changing between the two."""
    found = {"replicate": run_trainer(rank, f"{folder}/replicate", 1, 2)}
    found["zero1"] = run_trainer(rank, f"{folder}/zero1", 1, 2, data="zero1")
    for first in ("replicate", "zero1"):
        for then in ("replicate", "zero1"):
            run = f"{folder}/{first}-{then}"
            run_trainer(rank, run, 1, 2, stop_after=3, data=first)
            found[f"{first}, then {then}"] = run_trainer(rank, run, 1, 2, data=then)
    for name, mistake in mistakes_of_shared_state().items():
        run = f"{folder}/{name}"
        run_trainer(rank, run, 1, 2, stop_after=3, data="zero1")
        with mistake:
            found[f"planted: {name}"] = run_trainer(rank, run, 1, 2, data="zero1")
    return found


def mistakes_of_shared_state() -> dict[str, Any]:
    shares, prepare = ZeroRedundancyOptimizer._broadcast_params_from_rank, pieces.prepare_moments

    def from_the_next(self: Any, rank: int) -> Any:
        return shares(self, (rank + 1) % self.world_size) if rank == 0 else []

    def no_moments(optimizer: Any, updates: int) -> None:
        prepare(optimizer, updates)
        for part in optimizer.parts:
            part.optim.state.clear()

    return {
        "one shard is given to nobody": mock.patch.object(
            ZeroRedundancyOptimizer, "_broadcast_params_from_rank", from_the_next
        ),
        "moments of the shard are not read": mock.patch.object(pieces, "prepare_moments", no_moments),
    }


def test_runs_that_share_out_the_optimizers_state_have_the_bits_of_those_that_do_not(tmp_path):
    for rank, found in enumerate(run_gang(runs_with_shared_state, 2, str(tmp_path))):
        whole = found.pop("replicate")
        for name, run in found.items():
            equal = all(torch.equal(whole["weights"][n], weight) for n, weight in run["weights"].items())
            assert equal != name.startswith("planted"), f"rank {rank}: {name}"
            if rank == 0 and equal:
                assert equal_runs(whole, run), name
            assert run["first"] == (0 if name == "zero1" else 3)


def test_record_of_an_older_version_is_continued(tmp_path):
    """Its Parquet parts lack what was added since: those figures are null, the others are kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "metrics"
    folder.mkdir()
    rows = [{"step": step, "loss": 2.0, "seconds": 1.0, "max_vio": [0.5], "demand": [[3, 1]]} for step in (1, 2, 3)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "steps-00000001-00000003.parquet")
    recorder = Recorder(tmp_path, True, flops_per_token=1e3, peak_flops=1e9)
    recorder.open(2, 6, [])
    recorder.close()
    assert [(row["step"], row["loss"], row["entropy"]) for row in recorder.rows] == [(1, 2.0, None), (2, 2.0, None)]
    assert [row["demand"] for row in recorder.recent] == [[[3, 1]]] * 2


def one_process(rank: int, folder: str) -> dict[str, Any]:
    """Checks that need a mesh of one: bf16, faults."""
    config = small_config(train={"precision": "bf16", "steps": 20}, optimizer={"lr": 0.01})
    trainee = parallel_trainee(config, 1, optimizer="adamw")
    losses = [train_step(trainee, random_rows(6), step).loss for step in range(20)]
    dtypes = {p.dtype for p in trainee.model.parameters()}
    before = [p.detach().clone() for p in trainee.model.parameters()]
    with torch.no_grad():
        trainee.model.embedding.weight[0, 0] = math.inf
    figures = train_step(trainee, torch.zeros(2, 13, dtype=torch.int64), 20)
    after = [p.detach() for p in trainee.model.parameters()]
    kept = all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))
    return {"losses": losses, "dtypes": dtypes, "skipped": figures.skipped, "kept": kept}


def test_bf16_trains_fp32_weights_and_an_infinite_gradient_is_no_update(tmp_path):
    (found,) = run_gang(one_process, 1, str(tmp_path))
    assert found["losses"][-1] < found["losses"][0] - 0.5
    assert found["dtypes"] == {torch.float32}
    assert found["skipped"] and found["kept"]
