"""Pre-LN, pre-RMSNorm and CRMSNorm are one function of the tokens: logits in fp64, dense and with experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_dist.config import ModelConfig
from moe_dist.errors import ConfigError
from moe_dist.interop.norms import without_layer_norm
from moe_dist.model import Transformer
from tests.support.models import plain_model, random_rows, small_config
from tests.support.tolerances import assert_close

BASE = {"norm": "layer", "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
GPT: dict[str, Any] = {"num_dense_layers": 3, "positions": "learned", "ffn_activation": "gelu", "ffn_bias": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense, as GPT-2": ({**BASE, **GPT, "attention": {"qkv_bias": True, "output_bias": True}}, {}),
    "dense and experts, no biases": ({**BASE, "num_dense_layers": 1, "attention": {"qk_norm": "head"}}, {}),
    "experts with biases, convolutions, an output of its own": (
        {**BASE, "mix": {"kind": "conv"}, "tie_embeddings": False, "ffn_bias": True},
        {"expert_bias": True, "router_bias": True, "activation": "relu"},
    ),
}


def layer_norm_model(name: str) -> Transformer:
    """With a mean, a scale and a bias in everything, but for the last bias, which has nowhere to go."""
    model, moe = CASES[name]
    made, draw = plain_model(small_config(moe, model=model)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64) + 0.1)
        made.final_norm.bias.zero_()
    return made.eval()


def built(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Transformer:
    model = Transformer(config).double()
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_stay_without_the_mean_and_without_the_last_channel(name: str) -> None:
    model, rows = layer_norm_model(name), random_rows(2)
    hidden, records = model(rows)
    for kind, width in (("rms", 16), ("centred_rms", 15)):
        config, weights = without_layer_norm(model.config, model.state_dict(), kind)
        other = built(config, weights)
        found, told = other(rows)
        assert found.shape[-1] == width == config.width
        assert_close(other.logits(found), model.logits(hidden), f"{kind}: logits")
        for ours, theirs in zip(told, records, strict=True):
            assert torch.equal(ours.plan.row_TK, theirs.plan.row_TK)


def test_weights_that_are_given_stay_as_they_are() -> None:
    model = layer_norm_model("dense and experts, no biases")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    without_layer_norm(model.config, model.state_dict(), "centred_rms")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "moe", "where"),
    [
        ({"norm": "rms"}, {}, "model.norm"),
        ({"mix": {"kind": "adapter"}}, {}, "model.mix.kind"),
        ({"num_kv_heads": 4, "attention": {"kind": "latent"}}, {}, "model.attention.kind"),
        ({}, {"router": "noisy_topk"}, "model.moe.router"),
        ({}, {"shared_expert_gate": True}, "model.moe.shared_expert_gate"),
        ({}, {"latent_width": 8}, "model.moe.latent_width"),
    ],
)
def test_what_has_no_place_for_a_bias_is_refused(model: dict[str, Any], moe: dict[str, Any], where: str) -> None:
    made = plain_model(small_config(moe, model={**BASE, **model}))
    with pytest.raises(ConfigError, match=where):
        without_layer_norm(made.config, made.state_dict(), "rms")


def test_a_last_bias_is_refused() -> None:
    model = layer_norm_model("dense, as GPT-2")
    torch.nn.init.ones_(model.final_norm.bias)
    with pytest.raises(ConfigError, match=r"final_norm\.bias"):
        without_layer_norm(model.config, model.state_dict(), "rms")
