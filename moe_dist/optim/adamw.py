"""AdamW with decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from moe_dist.config.schema import OptimizerConfig


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; norms (vectors) and the embedding are not decayed. Source: Loshchilov and Hutter 2019."""
    named = dict(model.named_parameters())
    decayed = [p for name, p in named.items() if p.ndim >= 2 and not name.startswith("embedding.")]
    others = [p for name, p in named.items() if p.ndim < 2 or name.startswith("embedding.")]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
