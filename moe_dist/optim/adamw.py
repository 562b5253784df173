"""AdamW with decay on matrices only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_dist.config.schema import OptimizerConfig


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; norms, biases and embeddings are not decayed. Source: Loshchilov and Hutter 2019."""
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or name.startswith(("embedding.", "positions.")) or name.endswith("_bias")
        # One fused operation cannot mix parameters that are shared out over different ranks.
        groups.setdefault((spared, getattr(parameter, "device_mesh", None)), []).append(parameter)
    decayed_first = sorted(groups.items(), key=lambda group: group[0][0])
    asked = [{"params": p, "weight_decay": 0.0 if spared else config.weight_decay} for (spared, _), p in decayed_first]
    return torch.optim.AdamW(asked, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
