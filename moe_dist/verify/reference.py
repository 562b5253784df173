"""Judging the one-process layer by the oracle that loops over tokens (`moe/reference.py`), on a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.moe.decision import RoutingContext
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.randomness import Draw
from moe_dist.moe.reference import moe_reference
from moe_dist.moe.reference_routing import Occasion
from moe_dist.verify.step import whole_model
from moe_dist.verify.tolerances import relative_error

_ROWS, _TOKENS = 2, 6
_NAMES = {"router.weight": "router", "router.bias": "router_bias", "router.noise_weight": "noise"}
_NAMES |= {"latent_in.weight": "latent_in", "latent_out.weight": "latent_out"}


def judge_layers(config: Config) -> dict[str, float]:
    """Relative errors of the routed part of every layer by what is compared; infinite where counts differ."""
    found: dict[str, float] = {}
    for path, layer in whole_model(config).moe_layers():
        for what, error in _judge(layer.double(), config).items():
            found[f"{path}: {what}"] = error
    return found


def _judge(layer: MoELayer, config: Config) -> dict[str, float]:
    layer.shared = layer.shared_gate = None
    layer.train()
    generator = torch.Generator().manual_seed(config.seed)
    shape = (_ROWS, _TOKENS, config.model.width)
    x_BSD = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    token_BS = torch.randint(config.model.vocab_size, shape[:2], generator=generator)
    counted_BS = torch.ones(shape[:2], dtype=torch.bool)
    counted_BS[-1, -1] = False  # padding
    bias_E = dict(layer.named_buffers()).get("router.selection_bias")
    if bias_E is not None:
        bias_E.copy_(torch.linspace(-0.3, 0.3, layer.config.num_experts))
    weights = _weights(layer)
    out_BSD, record = layer(x_BSD, counted_BS, RoutingContext(token_BS, Draw(config.seed, 0, 0)))
    wanted_BSD, stats = moe_reference(
        weights, x_BSD, counted_BS, layer.config, True, Occasion(token_BS.tolist(), config.seed, layer=layer.number)
    )
    terms = ("balance_sum", "group_balance_sum", "z_sum")
    errors = {name: relative_error(getattr(record, name).detach(), stats[name].detach()) for name in terms}
    for name in ("demand_E", "served_E"):
        errors[name] = 0.0 if torch.equal(getattr(record.plan, name), stats[name]) else float("inf")
    errors["output"] = relative_error(out_BSD.detach(), wanted_BSD.detach())
    given = {"input": x_BSD} | {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
    sides = [(out_BSD, [getattr(record, name) for name in terms]), (wanted_BSD, [stats[name] for name in terms])]
    found, expected = (_gradients(out, sums, list(given.values())) for out, sums in sides)
    errors |= {f"gradient of {n}": relative_error(f, e) for n, f, e in zip(given, found, expected, strict=True)}
    return errors


def _weights(layer: MoELayer) -> dict[str, Tensor]:
    """The layer's weights by the oracle's names."""
    held = [*layer.named_parameters(), *layer.named_buffers()]
    return {_NAMES.get(name, name.rpartition(".")[2]): tensor for name, tensor in held}


def _gradients(out: Tensor, sums: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    """Of an objective in which no token, channel or term weighs as another."""
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    total = (out * slope).sum() + 0.1 * sums[0] + 0.2 * sums[1] + 0.01 * sums[2]
    grads = torch.autograd.grad(total, given, allow_unused=True)
    return [torch.zeros_like(g) if grad is None else grad for g, grad in zip(given, grads, strict=True)]
