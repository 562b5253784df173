"""AdamW with decay on matrices only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_dist.config.schema import OptimizerConfig


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; norms (vectors) and the embedding are not decayed. Source: Loshchilov and Hutter 2019."""
    groups: dict[tuple[float, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = config.weight_decay if parameter.ndim >= 2 and not name.startswith("embedding.") else 0.0
        # One fused operation cannot mix parameters that are shared out over different ranks.
        groups.setdefault((decay, getattr(parameter, "device_mesh", None)), []).append(parameter)
    asked = [{"params": parameters, "weight_decay": decay} for (decay, _), parameters in groups.items()]
    return torch.optim.AdamW(asked, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
