"""The optimizer, its parameter groups and the schedule of its learning rate."""

from moe_dist.optim.adamw import build_adamw, set_learning_rate
from moe_dist.optim.schedule import learning_rate

__all__ = ["build_adamw", "learning_rate", "set_learning_rate"]
