"""Rows as the model takes them: padding has no target, and adding some changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.objectives.language_modelling import language_modelling_sums, token_nats
from moe_dist.objectives.micro_batch import PADDING, MicroBatch, counted_tokens
from tests.support.models import LENGTH, plain_model, random_rows, small_config
from tests.support.parallel_step import oracle_step
from tests.support.tolerances import assert_close

MISSING = 4


def test_micro_batch_worked_by_hand():
    rows = torch.tensor([[5, 6, 0, 7, 0, PADDING], [8, PADDING, PADDING, PADDING, PADDING, PADDING]])
    batch = MicroBatch.of(rows, end_of_text=0)
    assert batch.tokens_BS.tolist() == [[5, 6, 0, 7, 0], [8, 0, 0, 0, 0]]
    assert batch.target_BS.tolist() == rows[:, 1:].tolist()
    assert batch.counted_BS is not None and batch.position_BS is not None
    assert batch.counted_BS.int().tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert batch.position_BS.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert int(counted_tokens(rows)) == 4
    hidden, targets = batch.targets(torch.arange(10)[:, None])
    assert hidden[:, 0].tolist() == [0, 1, 2, 3] and targets.tolist() == [6, 0, 7, 0]
    full = MicroBatch.of(random_rows(2))
    assert full.counted_BS is None and full.position_BS is None


def more_padding(rows: Tensor) -> Tensor:
    """The rows with padding behind their tokens, and rows of padding behind them."""
    longer = torch.nn.functional.pad(rows, (0, MISSING), value=PADDING)
    return torch.cat([longer, torch.full_like(longer[:2], PADDING)])


@pytest.mark.parametrize("documents", ["joined", "separate"])
@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"capacity_factor": 0.75, "selection_bias": True, "balance_scope": "global"},
        {
            "capacity_factor": 1.0,
            "capacity_factor_eval": 1.0,
            "pad_to_capacity": True,
            "drop_policy": "position_choice_major",
        },
        {"capacity_factor": 0.75, "capacity_group": "rank", "balance_scope": "micro_batch"},
        {"router": "sigmoid_topk", "num_groups": 4, "groups_per_token": 2, "group_balance_loss": 0.1},
    ],
)
def test_step_padding_that_is_added_changes_nothing(moe: dict[str, Any], documents: str):
    """Trap 10, of the whole model and its loss."""
    config = small_config({"balance_loss": 0.2, "z_loss": 0.01, **moe}, data={"documents": documents})
    rows = random_rows(3)
    rows[torch.arange(3), torch.tensor([3, 7, 11])] = 0  # ends a document in a proof
    expected, found = oracle_step(config, rows), oracle_step(config, more_padding(rows))
    for name, value in expected.scalars.items():
        assert found.scalars[name] == pytest.approx(value, rel=1e-10, abs=1e-12), name
    assert torch.equal(found.counts, expected.counts)
    for name, gradient in expected.gradients.items():
        assert_close(found.gradients[name], gradient, name)


def test_positions_that_do_not_count_have_no_rows_and_no_loss():
    model = plain_model(small_config()).train()
    rows = torch.full((2, LENGTH + 1), PADDING)
    sums = language_modelling_sums(model, MicroBatch.of(rows))
    assert float(sums.cross_entropy.detach()) == float(sums.balance.detach()) == float(sums.z.detach()) == 0.0
    assert all(record.plan.slot_N.numel() == 0 and not record.plan.demand_E.any() for record in sums.records)
    sums.total(model.config.moe).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)
    nats, targets = token_nats(model, MicroBatch.of(rows), 5)
    assert nats.shape == targets.shape == (0,)
