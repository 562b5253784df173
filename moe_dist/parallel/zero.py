"""ZeRO stage 1: every rank keeps the optimizer's state of some parameters, updates those, and gives them to the others.

A parameter is kept whole, by one of the ranks that sum its gradient (`reduction_group`): these hold the same value and,
after the sum, the same gradient. Source: Rajbhandari et al. 2020, section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from moe_dist.config import ParallelConfig
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.gradients import reduction_group
from moe_dist.parallel.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer


class ShardedOptimizer(Optimizer):
    """An optimizer whose state is shared out; `step` is entered by all ranks.

    Its `param_groups` hold all parameters and are those of the parts, so that a learning rate that is set reaches each.

    Args:
        optimizer: Of the whole model, without state.
        model: As cut for this rank.
        mesh: Its groups.
    """

    def __init__(self, optimizer: Optimizer, model: Transformer, mesh: Mesh) -> None:
        group_of = {p: reduction_group(model, name, mesh) for name, p in model.named_parameters()}
        self.parts = [
            _part(optimizer, group, [p for p in group_of if group_of[p] is group])
            for group in dict.fromkeys(group_of.values())
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the parameters whose state is here, and takes the others from the ranks that updated them."""
        assert closure is None, "a step never runs the model again"
        for part in self.parts:
            part.step()


def share_out(optimizer: Optimizer, model: Transformer, mesh: Mesh, parallel: ParallelConfig) -> Optimizer:
    """An optimizer without state as `parallel.data` asks for it."""
    return ShardedOptimizer(optimizer, model, mesh) if parallel.data == "zero1" else optimizer


def state_holders(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that hold this rank's state: those of a sharded one's parts, or the optimizer itself."""
    return [part.optim for part in optimizer.parts] if isinstance(optimizer, ShardedOptimizer) else [optimizer]


def _part(optimizer: Optimizer, group: ProcessGroup, parameters: list[torch.nn.Parameter]) -> ZeroRedundancyOptimizer:
    """Those of an optimizer's parameters that one group of ranks holds alike."""

    from torch.distributed.optim import ZeroRedundancyOptimizer  # it compiles at import: only where it is used

    mine = set(parameters)
    groups = [{**given, "params": [p for p in given["params"] if p in mine]} for given in optimizer.param_groups]
    filled = [given for given in groups if given["params"]]
    kind: Any = type(optimizer)  # its groups carry all their settings
    return ZeroRedundancyOptimizer(filled, kind, process_group=group)
