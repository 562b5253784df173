"""Tensor, sequence and expert-tensor parallelism: the step of every layout is that of one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint import pieces
from moe_dist.checkpoint.save import Saved, save_checkpoint
from moe_dist.config import Config
from moe_dist.parallel.fsdp import whole
from moe_dist.parallel.tensor import gather_cut
from moe_dist.train.step import Trainee, train_step
from tests.support import checkpoints
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step, parallel_trainee
from tests.support.routers import ROUTERS
from tests.support.tolerances import RELATIVE

TOLERANCE = RELATIVE[torch.float64]
MODEL = {"num_heads": 4, "num_kv_heads": 2, "num_dense_layers": 1, "num_layers": 3}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropless": ({}, {}),
    "untied": ({"shared_expert_width": 0}, {"tie_embeddings": False}),
    "capacity of sequences by probability": ({"capacity_factor": 0.8}, {}),
    "capacity choice-major, global balance": (
        {"capacity_factor": 0.8, "drop_policy": "position_choice_major", "balance_scope": "global"},
        {},
    ),
    "capacity of the rank, micro-batch balance": (
        {"capacity_factor": 0.8, "capacity_group": "rank", "balance_scope": "micro_batch"},
        {},
    ),
    "sigmoid, groups, bias, gelu": ({**ROUTERS["sigmoid, groups, bias"], "activation": "gelu", "latent_width": 6}, {}),
    "noisy with jitter": ({**ROUTERS["noisy"], "input_jitter": 0.1}, {}),
    "gshard": (ROUTERS["gshard"], {}),
    "hash": (ROUTERS["hash"], {}),
}
# ranks: (tensor, expert, expert-tensor)
LAYOUTS = {2: [(2, 1, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2)], 4: [(2, 2, 1), (2, 4, 1), (2, 2, 2), (1, 2, 2), (2, 1, 4)]}
ROWS = {2: 3, 4: 5}


def config_of(variant: str, ranks: int, degrees: tuple[int, int, int]) -> Config:
    moe, model = VARIANTS[variant]
    tensor, expert, cut = degrees
    parallel = {"tensor": tensor, "expert": expert, "expert_tensor": cut}
    by_rank = moe.get("capacity_group") == "rank" or moe.get("balance_scope") == "micro_batch"
    train = {"global_batch_sequences": ROWS[ranks], "micro_batch_sequences": ROWS[ranks] if by_rank else 2}
    train |= {"loss_chunk_tokens": 7}  # more than one chunk, the last one smaller
    options = {"balance_loss": 0.2, "z_loss": 0.01, **moe}
    return small_config(options, model={**MODEL, **model}, parallel=parallel, train={**train, "clip_norm": 0.5})


def shares_of(ranks: int, tensor: int) -> list[Any]:
    rows, copies = random_rows(ROWS[ranks]), ranks // tensor
    return [rows[len(rows) * c // copies : len(rows) * (c + 1) // copies] for c in range(copies)]


def cases_of(ranks: int) -> list[tuple[str, tuple[int, int, int]]]:
    """What a rank counts by itself is the same only where one copy of the dense parameters reads all rows."""
    whole = {"capacity of the rank, micro-batch balance"}
    return [(v, d) for v in VARIANTS for d in LAYOUTS[ranks] if v not in whole or d[0] == ranks]


def steps_of_rank(rank: int, ranks: int) -> dict[Any, StepProof]:
    found = {}
    for variant, degrees in cases_of(ranks):
        config = config_of(variant, ranks, degrees)
        found[variant, degrees] = candidate_step(rank, config, degrees[1], shares_of(ranks, degrees[0]))
    return found


@cache
def steps_of(ranks: int) -> list[dict[Any, StepProof]]:
    return run_gang(steps_of_rank, ranks, ranks, timeout_seconds=300)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_cut_makes_the_step_of_one_process(ranks):
    for variant, degrees in cases_of(ranks):
        expected = oracle_step(config_of(variant, ranks, degrees), random_rows(ROWS[ranks]))
        if "capacity" in variant:
            assert not torch.equal(expected.counts[0], expected.counts[1]), "the case must drop something"
        difference = first_difference([found[variant, degrees] for found in steps_of(ranks)], expected, TOLERANCE)
        assert difference is None, f"{variant}, tensor, expert, expert-tensor {degrees} of {ranks}: {difference}"


# name: (ranks, overrides of `parallel`)
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"expert": 1}),
    "data 2, expert 2": (2, {"expert": 2}),
    "tensor 2, expert 2": (2, {"tensor": 2, "expert": 2}),
    "tensor 2, expert 2, expert-tensor 2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2, "data": "zero1"}),
    "tensor 2, expert 4": (4, {"tensor": 2, "expert": 4}),
    "expert 3, zero1": (3, {"expert": 3, "data": "zero1"}),
    "fsdp 2, tensor 2, expert 2": (4, {"tensor": 2, "expert": 2, "data": "fsdp"}),
    "fsdp 2 in 2 copies, expert 1": (4, {"expert": 1, "data": "fsdp", "data_shard": 2}),
}
STEPS, ROWS_OF_STEP = 20, 8


def run_config(parallel: dict[str, Any]) -> Config:
    train = {"precision": "fp32", "steps": STEPS, "global_batch_sequences": ROWS_OF_STEP, "micro_batch_sequences": 4}
    moe = {"balance_loss": 0.02, "router": "softmax_topk", "selection_bias": True, "capacity_factor": 2.0}
    optimizer = {"lr": 1e-3, "warmup_steps": 5}
    model = {**MODEL, "init_std": 0.05}
    return small_config(moe, model=model, train=train, parallel=parallel, optimizer=optimizer)


def run_of(parallel: dict[str, Any], root: str | None = None) -> dict[str, Any]:
    """The losses of some steps with AdamW, and the routers as this rank has them then."""
    config = run_config(parallel)
    trainee = parallel_trainee(config, parallel["expert"], "adamw")
    losses = []
    for step in range(STEPS):
        rows = random_rows(ROWS_OF_STEP, seed=step).tensor_split(trainee.mesh.layout.data)[trainee.mesh.data_place]
        losses.append(train_step(trainee, rows, step).loss)
    named = trainee.model.named_parameters()
    routers = {n: whole(p.detach()).clone() for n, p in named if "router" in n or "norm" in n}
    if root is not None:
        saved = Saved(STEPS, config.model_dump(mode="json"), {})
        save_checkpoint(Path(root), trainee.model, trainee.optimizer, trainee.mesh, saved, keep=1)
    return {"losses": losses, "routers": routers, "state": whole_state(trainee)}


def whole_state(trainee: Trainee) -> dict[str, torch.Tensor]:
    """Weights and moments held here, each put together."""
    return {
        f"{kind}/{piece.name}": gather_cut(piece, tensor, trainee.mesh).clone()
        for piece, tensors in pieces.pieces_here(trainee.model, trainee.optimizer)
        for kind, tensor in tensors.items()
    }


def restored(parallel: dict[str, Any], root: str) -> dict[str, torch.Tensor]:
    trainee = parallel_trainee(run_config(parallel), parallel["expert"], "adamw")
    assert checkpoints.restored(Path(root), trainee) is not None
    return whole_state(trainee)


def runs_of_rank(rank: int, ranks: int, root: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (wanted, parallel) in RUNS.items():
        if wanted == ranks:
            found[name] = run_of(parallel, root if "expert-tensor" in name else None)
            if "tensor 2" in name or "fsdp" in name:
                found[f"{name}, again"] = run_of(parallel)
    if ranks == 4:
        other = {"tensor": 1, "expert": 4}, {"tensor": 2, "expert": 1}, {"tensor": 1, "expert": 1, "expert_tensor": 4}
        other = *other, *({"tensor": 2, "expert": 2, "data": data} for data in ("zero1", "fsdp"))
        found["restored"] = [restored(parallel, root) for parallel in other]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    root = str(tmp_path_factory.mktemp("cut"))
    return {ranks: run_gang(runs_of_rank, ranks, ranks, root, timeout_seconds=300) for ranks in (1, 2, 3, 4)}


def test_twenty_steps_have_the_losses_of_one_process(runs):
    expected = runs[1][0]["one process"]["losses"]
    for name, (ranks, _) in RUNS.items():
        for found in runs[ranks]:
            assert found[name]["losses"] == pytest.approx(expected, rel=RELATIVE[torch.float32]), name


def test_the_same_layout_twice_is_equal_bit_for_bit(runs):
    for name, (ranks, _) in RUNS.items():
        for found in runs[ranks] if f"{name}, again" in runs[ranks][0] else []:
            assert found[f"{name}, again"]["losses"] == found[name]["losses"]
            for key, tensor in found[name]["state"].items():
                assert torch.equal(found[f"{name}, again"]["state"][key], tensor), key


def test_what_every_rank_holds_is_the_same_bits_on_all(runs):
    """Trap 5: routers and norms see other tokens on every rank of a tensor group; without their sums they drift."""
    for name, (ranks, _) in RUNS.items():
        for found in runs[ranks]:
            for key, tensor in runs[ranks][0][name]["routers"].items():
                assert torch.equal(found[name]["routers"][key], tensor), (name, key)


def test_checkpoint_of_a_cut_model_loads_into_other_cuts(runs):
    """Trap 15: weights and both moments, of dense parts and of every expert."""
    saved: dict[str, torch.Tensor] = {}
    for found in runs[4]:
        saved |= found["tensor 2, expert 2, expert-tensor 2"]["state"]
    for layout in range(5):
        loaded: dict[str, torch.Tensor] = {}
        for found in runs[4]:
            loaded |= found["restored"][layout]
        assert loaded.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(loaded[name], tensor), name
