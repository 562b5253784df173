"""Routers in a training step: any layout draws the same numbers and moves the same bias, and checkpoints keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_dist.checkpoint import pieces
from moe_dist.checkpoint.load import load_model
from moe_dist.checkpoint.save import Saved, save_checkpoint
from moe_dist.model.naming import global_buffers
from moe_dist.moe.router import build_router
from moe_dist.train.step import train_step
from tests.support import checkpoints
from tests.support.gang import run_gang
from tests.support.models import random_rows, small_config
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step, parallel_trainee
from tests.support.routers import ROUTERS
from tests.support.tolerances import RELATIVE

TOLERANCE = RELATIVE[torch.float64]

VARIANTS: dict[str, dict[str, Any]] = {
    "gshard, choice-major": {"router": "gshard", "capacity_factor": 1.0, "drop_policy": "position_choice_major"},
    "noisy": ROUTERS["noisy"],
    "jitter, global balance": {"input_jitter": 0.2, "balance_scope": "global"},
    "expert choice": ROUTERS["expert choice"],
    "hash": ROUTERS["hash"],
    "sigmoid, groups, bias": {**ROUTERS["sigmoid, groups, bias"], "bias_update_rate": 0.05},
}


def config_of(variant: str, micro: int = 2):
    train = {"global_batch_sequences": 6, "micro_batch_sequences": 6 if "global" in variant else micro}
    moe = {"balance_loss": 0.1, **VARIANTS[variant]}
    return small_config(moe, train=train, generate={"prompts": ()}, seed=5)


def mine(rank: int, ranks: int, seed: int = 1) -> torch.Tensor:
    return random_rows(6, seed)[6 * rank // ranks : 6 * (rank + 1) // ranks]


def steps_of(rank: int, ranks: int, degrees: list[int]) -> dict[Any, StepProof]:
    parts = [mine(r, ranks) for r in range(ranks)]
    return {
        (degree, variant): candidate_step(rank, config_of(variant), degree, parts)
        for degree in degrees
        for variant in VARIANTS
    }


BIASED = "sigmoid, groups, bias"


def train_with_bias(trainee: Any, rank: int, ranks: int, steps: range) -> None:
    for step in steps:
        train_step(trainee, mine(rank, ranks, seed=step), step)


def biases_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in global_buffers(model).items()}


def trained_biases(rank: int, ranks: int, degree: int, root: str) -> dict[str, Any]:
    """Four updates, saved after the second; and the same, continued from what was saved by whoever saved first."""
    config = config_of(BIASED)
    trainee = parallel_trainee(config, degree, optimizer="adamw")
    train_with_bias(trainee, rank, ranks, range(2))
    halfway = biases_of(trainee.model)
    saved = Saved(2, config.model_dump(mode="json"), {"cursor": 12})
    if checkpoints.restored(Path(root), parallel_trainee(config, degree, optimizer="adamw")) is None:
        save_checkpoint(Path(root), trainee.model, trainee.optimizer, trainee.mesh, saved, keep=2)
    train_with_bias(trainee, rank, ranks, range(2, 4))

    other = parallel_trainee(config, degree, optimizer="adamw")
    assert checkpoints.restored(Path(root), other) is not None
    restored = biases_of(other.model)
    train_with_bias(other, rank, ranks, range(2, 4))
    return {
        "halfway": halfway,
        "restored": restored,
        "whole": biases_of(trainee.model),
        "continued": biases_of(other.model),
    }


def _check_what_the_checkpoint_holds(root: Path, halfway: dict[str, torch.Tensor]) -> None:
    path, manifest = checkpoints.newest(root)
    names = [name for part in manifest.parts for name in load_file(path / part.file)]
    assert sorted(names) == sorted(pieces.expected_shapes(config_of(BIASED).model))
    assert {f"model/{name}" for name in halfway} <= set(names)
    model = load_model(path, manifest, torch.device("cpu"))
    assert all(torch.equal(tensor, halfway[name]) for name, tensor in global_buffers(model).items())


def bias_by_capacity(rank: int) -> list[dict[str, Any]]:
    found = []
    for factor in (None, 1.0, 0.4):
        moe = {"selection_bias": True, "bias_update_rate": 0.05, "capacity_factor": factor}
        config = small_config(moe, model={"num_layers": 1})
        trainee = parallel_trainee(config, 1)
        figures = train_step(trainee, random_rows(6), 0)
        found.append({"served": figures.served, "bias": biases_of(trainee.model)})
    return found


def everything(rank: int, ranks: int, degrees: list[int], root: str) -> dict[str, Any]:
    """All checks of one number of ranks in one gang: starting processes is what costs time."""
    return {
        "steps": steps_of(rank, ranks, degrees),
        "biases": trained_biases(rank, ranks, degrees[-1], root),
        "capacities": bias_by_capacity(rank) if ranks == 1 else [],
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def gangs(root: Path) -> dict[int, list[dict[str, Any]]]:
    """What every rank of two (which save the checkpoint), one and three ranks found."""
    layouts = {2: [2], 1: [1], 3: [1, 3]}
    return {ranks: run_gang(everything, ranks, ranks, degrees, str(root)) for ranks, degrees in layouts.items()}


def test_every_router_makes_the_step_of_one_process_in_any_layout(gangs):
    for ranks, results in gangs.items():
        for degree, variant in results[0]["steps"]:
            expected = oracle_step(config_of(variant), random_rows(6))
            proofs = [result["steps"][degree, variant] for result in results]
            difference = first_difference(proofs, expected, TOLERANCE)
            assert difference is None, f"expert degree {degree} of {ranks}, {variant}: {difference}"


def test_selection_bias_is_bit_identical_over_layouts_and_checkpoints(gangs, root):
    results = [result["biases"] for ranks in gangs.values() for result in ranks]
    first = results[0]
    assert sorted(first["whole"]) == [f"blocks.{n}.feed_forward.router.selection_bias" for n in range(2)]
    for name, bias in first["whole"].items():
        assert bias.dtype == torch.float32
        assert float(bias.abs().max()) > 0.05 and not torch.equal(bias, first["halfway"][name])
        for result in results:
            assert torch.equal(result["halfway"][name], first["halfway"][name])
            assert torch.equal(result["restored"][name], first["halfway"][name])
            assert torch.equal(result["whole"][name], bias) and torch.equal(result["continued"][name], bias)
    _check_what_the_checkpoint_holds(root, first["halfway"])


def test_selection_bias_moves_by_demand_whatever_the_capacity_drops(gangs):
    """Trap 11. One layer and one step: later ones see other hidden states."""
    found = gangs[1][0]["capacities"]
    assert len({int(result["served"].sum()) for result in found}) == 3
    for result in found[1:]:
        assert all(torch.equal(result["bias"][name], bias) for name, bias in found[0]["bias"].items())


def test_every_router_kind_of_the_schema_can_be_built():
    from typing import get_args

    from moe_dist.config import MoEConfig

    for kind in get_args(MoEConfig.model_fields["router"].annotation):
        config = MoEConfig(num_experts=4, router=kind)
        assert build_router(8, config, 0).config.router == kind
