"""Feed-forwards and norms against those of torch and transformers, and that positions are learned by place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from moe_dist.config import ModelConfig
from moe_dist.model.feed_forward import FeedForward
from moe_dist.model.norm import CentredRMSNorm, RMSNorm, norm_of
from tests.support.models import plain_model, random_rows, small_config

# Ours, and the name that transformers has for what the gate or the projection goes through.
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "gelu": "gelu", "relu": "relu", "squared_relu": "relu2"}


def filled(module: nn.Module, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feed_forward_equals_its_equation(name: str, bias: bool) -> None:
    ours = filled(FeedForward(ModelConfig(width=6, ffn_activation=name, ffn_bias=bias), 10))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden, activation = ours.first[1](x), ACT2FN[ACTIVATIONS[name]]
    gated = name.endswith("glu") and name != "gelu"
    inside = activation(hidden[:, :10]) * hidden[:, 10:] if gated else activation(hidden)
    assert hidden.shape == (3, 20 if gated else 10)
    torch.testing.assert_close(ours(x), ours.down(inside), rtol=1e-12, atol=1e-12)
    assert (ours.down.bias is None) != bias


def test_layer_norm_equals_torch() -> None:
    ours, theirs = filled(norm_of(ModelConfig(width=6, norm="layer"))), nn.LayerNorm(6, eps=1e-5).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_centred_norm_is_the_plain_one_of_vectors_whose_mean_is_zero() -> None:
    """Jiang et al. 2023: of D + 1 numbers with mean zero the last need not be kept."""
    centred, plain = CentredRMSNorm(6, 1e-5), RMSNorm(7, 1e-5)
    for norm in (centred, plain):
        nn.init.ones_(norm.double().weight)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(centred(x), plain(whole)[:, :6], rtol=1e-12, atol=1e-12)


def test_learned_positions_tell_equal_tokens_apart_and_none_do_not() -> None:
    def last_hidden(positions: str) -> torch.Tensor:
        model = plain_model(small_config(model={"positions": positions, "max_positions_tokens": 8}))
        return model(torch.full((1, 5), 3))[0][0]

    learned, none = last_hidden("learned"), last_hidden("none")
    assert float((learned[1] - learned[4]).abs().max()) > 1e-3
    # Equal tokens see equal tokens: without positions nothing tells them apart.
    torch.testing.assert_close(none[1], none[4], rtol=1e-10, atol=1e-12)


def test_learned_positions_refuse_a_longer_row() -> None:
    model = plain_model(small_config(model={"positions": "learned", "max_positions_tokens": 4}))
    with pytest.raises(IndexError):
        model(random_rows(1)[:, :6])
