"""Which runs can make text: those in which no later token changes what is said of earlier ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.samples import _check_that_text_can_be_made
from moe_dist.errors import ConfigError
from tests.support.models import plain_model, random_rows, small_config


def earlier_logits_move(moe: dict[str, Any]) -> bool:
    """Whether another last token changes a logit before it, in evaluation mode, for some of several rows."""
    model = plain_model(small_config(moe)).eval()
    rows = random_rows(8)[:, :-1]
    other = rows.clone()
    other[:, -1] = (other[:, -1] + 1) % 300
    with torch.no_grad():
        before, after = (model.logits(model(tokens)[0])[:, :-1] for tokens in (rows, other))
    return not torch.allclose(before, after, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", ["probability", "position_choice_major"])
def test_text_with_a_capacity_is_refused_for_a_later_token_moves_earlier_logits(policy: str) -> None:
    moe = {"capacity_factor_eval": 0.5, "drop_policy": policy}
    assert earlier_logits_move(moe)
    with pytest.raises(ConfigError, match=r"model\.moe\.capacity_factor_eval"):
        _check_that_text_can_be_made(small_config(moe))


@pytest.mark.parametrize("moe", [{}, {"capacity_factor": 0.5}, {"router": "sigmoid_topk", "selection_bias": True}])
def test_text_without_a_capacity_in_evaluation_is_made(moe: dict[str, Any]) -> None:
    assert not earlier_logits_move(moe)
    _check_that_text_can_be_made(small_config(moe))
