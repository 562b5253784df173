"""The terms and figures of a step: the same however the batch is cut, of all ranks together, and counted exactly.

Each check is a plain function of no fixture, so that mistakes can be planted under it (tests/moe/test_planted_more.py).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.optim import build_adamw
from moe_dist.train import step
from moe_dist.train.metrics import step_row
from tests.support.models import LENGTH, plain_model, small_config
from tests.support.one_rank import one_rank
from tests.support.parallel_step import StepProof, candidate_step, first_difference, oracle_step
from tests.support.tolerances import RELATIVE, assert_close

ROWS = 6
TOLERANCE = RELATIVE[torch.float64]


def config_of(micro: int, balance_loss: float = 0.5, scope: str = "sequence", **train: Any) -> Config:
    moe = {"balance_loss": balance_loss, "balance_scope": scope}
    cut = {"global_batch_sequences": ROWS, "micro_batch_sequences": micro, "clip_norm": None, **train}
    return small_config(moe, train=cut)


def skewed_rows() -> Tensor:
    """Rows in order of the three tokens that they are made of: every micro-batch asks for few experts, and others."""
    token_BS = torch.randint(0, 3, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(6))
    return token_BS + 7 + torch.arange(ROWS)[:, None] // 2 * 40


def routers_of(proof: StepProof) -> dict[str, Tensor]:
    return {name: grad for name, grad in proof.gradients.items() if "router" in name}


def from_balance_alone(of: Any, micro: int) -> dict[str, Tensor]:
    """Gradients of the routers with the balance term less those without: what the term alone gives."""
    having, lacking = (routers_of(of(config_of(micro, balance_loss))) for balance_loss in (0.5, 0.0))
    return {name: grad - lacking[name] for name, grad in having.items()}


def step_of(config: Config) -> StepProof:
    with one_rank():
        return candidate_step(0, config, 1, [skewed_rows()])


def test_balance_gradient_is_the_same_however_the_batch_is_cut():
    """Trap 2."""
    expected = from_balance_alone(lambda config: oracle_step(config, skewed_rows()), ROWS)
    assert len(expected) == 2 and all(float(grad.norm()) > 1e-4 for grad in expected.values())
    for micro in (6, 4, 2, 1):  # of 4 rows: two parts of 3
        for name, grad in from_balance_alone(step_of, micro).items():
            assert_close(grad, expected[name], f"{name} in micro-batches of {micro}")


def test_global_balance_of_skewed_micro_batches_is_that_of_one_giant_batch():
    """Trap 3."""
    expected = oracle_step(config_of(ROWS, scope="global"), skewed_rows())
    for micro in (6, 3, 2, 1):
        found = step_of(config_of(micro, scope="global"))
        assert first_difference([found], expected, TOLERANCE) is None, micro


def sums_that_ask(demand_E: list[int]) -> Any:
    """What `_Tally.add` reads of a micro-batch with one layer."""
    demand, nothing = torch.tensor(demand_E), torch.zeros(())
    record = SimpleNamespace(
        plan=SimpleNamespace(demand_E=demand, served_E=demand),
        journey=SimpleNamespace(rows=int(demand.sum()), bytes_sent=0),
        probability_E=demand.double(),
        entropy_sum=nothing,
    )
    terms = dict.fromkeys(("cross_entropy", "balance", "group_balance", "z"), nothing)
    return SimpleNamespace(records=[record], **terms)


def figures_of(demands_RE: list[list[int]], times: int = 1) -> list[step.StepFigures]:
    """The figures of ranks that asked for so much, `times` times each; a rank's sums are added here, not sent."""
    config = small_config({"num_experts": len(demands_RE[0])}, model={"num_layers": 1})
    model, tallies = plain_model(config), []
    for rank, demand_E in enumerate(demands_RE):
        layout = SimpleNamespace(ranks=len(demands_RE))
        mesh = SimpleNamespace(rank=rank, tensor_place=0, layout=layout, world=None)
        tallies.append(step._Tally(SimpleNamespace(config=config, mesh=mesh, model=model), False, 0.0))
        for _ in range(times):
            tallies[-1].add(sums_that_ask(demand_E))
    flats = [torch.cat([value.flatten() for value in tally.sums.values()]) for tally in tallies]
    with mock.patch.object(step, "sum_ranks", lambda flat, group: torch.stack(flats).sum(0)):
        return [tally.figures(times * 8, 1.0, 1.0) for tally in tallies]


def test_imbalance_is_of_the_load_of_all_ranks_together():
    """Trap 18: each rank is as skewed as can be, the load of both is even."""
    for figures in figures_of([[8, 0, 8, 0], [0, 8, 0, 8]]):
        row = step_row(1, figures, seconds=1.0)
        assert row["max_vio"] == [0.0] and row["dead_experts"] == [0] and row["rank_load"] == [1.0]
        assert figures.balance_exact * 8 == pytest.approx(32.0)
    assert step_row(1, figures_of([[8, 0, 8, 0]])[0], seconds=1.0)["max_vio"] == [1.0]


def test_load_is_counted_exactly_beyond_what_a_narrow_type_holds():
    """Trap 12: bf16 stops at 256, fp32 at 2^24."""
    (figures,) = figures_of([[1, 2**24 + 1, 0, 5]], times=1000)
    assert figures.demand.tolist() == [[1000, 1000 * (2**24 + 1), 0, 5000]]
    assert figures.demand.dtype == figures.served.dtype == torch.int64


IDLE, STEPS = (1, 3), 4


def updated(stacks: list[Tensor], gradients: list[list[Tensor]], config: Any) -> list[Tensor]:
    """Weights after an AdamW step for each list of gradients; the model has these matrices and nothing else."""
    model = torch.nn.ParameterList(torch.nn.Parameter(stack.clone()) for stack in stacks)
    optimizer = build_adamw(model, config)
    for grads in gradients:
        for parameter, grad in zip(model, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    return [parameter.detach() for parameter in model]


def test_stacked_experts_are_updated_as_so_many_single_ones():
    """Trap 22: AdamW looks at elements alone, so experts do not mix; those without tokens decay and coast as any."""
    config = small_config(optimizer={"weight_decay": 0.3, "lr": 0.05}).optimizer
    generator = torch.Generator().manual_seed(4)
    stack = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) * 10**n for n in range(STEPS)]
    for grad in gradients[1:]:  # at the first step every expert has tokens, so that moments are left
        grad[list(IDLE)] = 0
    (together,) = updated([stack], [[grad] for grad in gradients], config)
    alone = updated(list(stack), [list(grad) for grad in gradients], config)
    assert_close(together, torch.stack(alone), "stacked experts")
    stay = updated([stack], [[gradients[0]]], config)[0]
    for expert in IDLE:
        wanted = coasted(stay[expert], gradients[0][expert], config)
        assert_close(together[expert], wanted, f"expert {expert}, without tokens after the first step")


def coasted(weight: Tensor, grad: Tensor, config: Any) -> Tensor:
    """AdamW written out for a weight whose gradient is zero from the second step on."""
    first, second = (1 - config.beta1) * grad, (1 - config.beta2) * grad.square()
    for step_number in range(2, STEPS + 1):
        first, second = first * config.beta1, second * config.beta2
        mean, square = first / (1 - config.beta1**step_number), second / (1 - config.beta2**step_number)
        weight = weight * (1 - config.lr * config.weight_decay) - config.lr * mean / (square.sqrt() + config.eps)
    return weight
