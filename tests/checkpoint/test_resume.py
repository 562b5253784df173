"""A run saved on four ranks with the experts shared out goes on in any layout as if nothing had happened.

Save on (expert 4); load on one process, (expert 2), (expert 3: shares of 3, 3 and 2), (tensor 2, expert 2),
(fsdp 2, expert 2), (expert 8). All loads of one number of ranks share a gang.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint import pieces
from moe_dist.checkpoint.save import Saved, save_checkpoint
from moe_dist.config import Config
from moe_dist.parallel.fsdp import filling
from moe_dist.parallel.tensor import gather_cut
from moe_dist.train.step import Trainee, train_step
from tests.support import checkpoints
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import parallel_trainee
from tests.support.tolerances import RELATIVE

BEFORE, AFTER, ROWS = 3, 5, 8
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"expert": 1}),
    "expert 2": (2, {"expert": 2}),
    "expert 3": (3, {"expert": 3}),
    "expert 4": (4, {"expert": 4}),
    "tensor 2, expert 2": (4, {"expert": 2, "tensor": 2}),
    "fsdp 2, expert 2": (4, {"expert": 2, "data": "fsdp", "data_shard": 2}),
}
WIDE: dict[str, tuple[int, dict[str, Any]]] = {"expert 8": (8, {"expert": 8})}
KINDS = {"model": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5}


def config_of(parallel: dict[str, Any]) -> Config:
    train = {"precision": "fp32", "steps": BEFORE + AFTER, "global_batch_sequences": ROWS, "micro_batch_sequences": 4}
    moe = {"balance_loss": 0.02, "selection_bias": True, "capacity_factor": 2.0}
    model = {"num_heads": 4, "num_kv_heads": 2, "num_dense_layers": 1, "num_layers": 3, "init_std": 0.05}
    optimizer = {"lr": 1e-3, "warmup_steps": 2}
    return small_config(moe, model=model, train=train, parallel=parallel, optimizer=optimizer)


def trainee_of(parallel: dict[str, Any]) -> Trainee:
    return parallel_trainee(config_of(parallel), parallel["expert"], "adamw")


def train(trainee: Trainee, first: int, steps: int) -> list[float]:
    """The losses of some steps, whose batches follow from their number."""
    places = trainee.mesh.layout.data, trainee.mesh.data_place
    rows = [random_rows(ROWS, seed=step).tensor_split(places[0])[places[1]] for step in range(first, first + steps)]
    return [train_step(trainee, mine, first + number).loss for number, mine in enumerate(rows)]


def save(trainee: Trainee, root: str, step: int) -> None:
    saved = Saved(step, trainee.config.model_dump(mode="json"), {"cursor": ROWS * step})
    save_checkpoint(Path(root), trainee.model, trainee.optimizer, trainee.mesh, saved, keep=1)


def mark_of(name: str) -> float:
    """Expert e is filled with e; a dense tensor with a number that follows from its name."""
    return float(name.rpartition("#")[2]) if "#" in name else float(sum(name.encode()) % 1000)


def state_of(trainee: Trainee) -> dict[str, torch.Tensor]:
    """Weights and moments held here, each put together."""
    return {
        f"{kind}/{piece.name}": gather_cut(piece, tensor, trainee.mesh).clone()
        for piece, tensors in pieces.pieces_here(trainee.model, trainee.optimizer)
        for kind, tensor in tensors.items()
    }


def saved_run(rank: int, folder: str) -> dict[str, Any]:
    """The run that is never interrupted, saved on its way; and a checkpoint of marked tensors."""
    trainee = trainee_of(LAYOUTS["expert 4"][1])
    before = train(trainee, 0, BEFORE)
    save(trainee, f"{folder}/run", BEFORE)
    losses = before + train(trainee, BEFORE, AFTER)
    state = state_of(trainee)
    with torch.no_grad():
        for of_parameter, tensors in pieces.parameters_here(trainee.model, trainee.optimizer):
            for kind, held in tensors.items():
                with filling(held) as whole:
                    for piece in of_parameter:
                        piece.of(whole).fill_(mark_of(piece.name) + KINDS[kind])
    save(trainee, f"{folder}/marked", BEFORE)
    return {"losses": losses, "state": state}


def continued_runs(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (wanted, parallel) in (LAYOUTS | WIDE).items():
        if wanted != ranks:
            continue
        trainee = trainee_of(parallel)
        assert checkpoints.restored(Path(folder) / "run", trainee) is not None
        losses = train(trainee, BEFORE, AFTER)
        found[name] = {"losses": losses, "state": state_of(trainee), "marked": {}}
        assert checkpoints.restored(Path(folder) / "marked", trainee) is not None
        for key, tensor in state_of(trainee).items():
            kind, _, tensor_name = key.partition("/")
            found[name]["marked"][key] = bool((tensor == mark_of(tensor_name) + KINDS[kind]).all())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def uninterrupted(folder: str) -> list[dict[str, Any]]:
    return run_gang(saved_run, 4, folder)


@pytest.fixture(scope="module")
def continued(uninterrupted: list[dict[str, Any]], folder: str) -> dict[str, list[dict[str, Any]]]:
    """By layout, what each of its ranks found."""
    gangs = {ranks: run_gang(continued_runs, ranks, ranks, folder) for ranks in (1, 2, 3, 4)}
    return {name: [rank[name] for rank in gangs[ranks]] for name, (ranks, _) in LAYOUTS.items()}


def check_losses(found: list[dict[str, Any]], uninterrupted: list[dict[str, Any]], name: str) -> None:
    expected = uninterrupted[0]["losses"][BEFORE:]
    assert len(set(expected)) == AFTER
    for rank in found:
        assert rank["losses"] == pytest.approx(expected, rel=RELATIVE[torch.float32], abs=0), name


def check_marks(found: list[dict[str, Any]], name: str) -> None:
    everything = pieces.expected_shapes(config_of({}).model).keys()
    buffers = {key for key in everything if "selection_bias" in key}
    seen: set[str] = set()
    for rank in found:
        assert [key for key, right in rank["marked"].items() if not right] == [], name
        seen |= rank["marked"].keys()
    assert seen == everything - buffers, name  # every expert and moment is somewhere


def test_next_steps_equal_those_of_a_run_that_was_never_interrupted(continued, uninterrupted):
    for name, found in continued.items():
        check_losses(found, uninterrupted, name)


def test_next_steps_on_the_same_layout_are_equal_bit_for_bit(continued, uninterrupted):
    for rank, before in zip(continued["expert 4"], uninterrupted, strict=True):
        assert rank["losses"] == before["losses"][BEFORE:]
        assert rank["state"].keys() == before["state"].keys()
        for name, tensor in before["state"].items():
            assert torch.equal(rank["state"][name], tensor), name


def test_every_expert_arrives_as_itself_with_its_moments(continued):
    for name, found in continued.items():
        check_marks(found, name)


@pytest.mark.slow
def test_eight_ranks_go_on_from_four(uninterrupted, folder):
    found = [rank["expert 8"] for rank in run_gang(continued_runs, 8, 8, folder)]
    check_losses(found, uninterrupted, "expert 8")
    check_marks(found, "expert 8")
