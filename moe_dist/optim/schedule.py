"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from moe_dist.config.schema import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine down to `min_lr_fraction` of the peak at the last step.

    Args:
        step: The update about to be made, from 0.
        steps: Updates of the whole run.
        config: Peak, floor and warm-up; a warm-up longer than the run is cut short by its end.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps + 1) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_fraction + (1 - config.min_lr_fraction) * cosine)
