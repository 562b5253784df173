"""Global names: what a parameter is called whatever rank holds it.

A dense parameter keeps its module path. A stacked expert parameter is one tensor an expert, named by global expert id:
`blocks.3.feed_forward.experts.down#17`. A buffer (a router's selection bias) keeps its module path.
Initial weights, checkpoints and proofs speak only of these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moe_dist.moe.experts import Experts


@dataclass(frozen=True)
class GlobalTensor:
    """One globally named piece of a parameter held here.

    Attributes:
        name: Global name, with `#expert` for a piece of a stacked parameter.
        parameter: Path of the module parameter it is a piece of.
        index: Position inside the stacked parameter; None for a dense one.
    """

    name: str
    parameter: str
    index: int | None

    def of(self, whole: Tensor) -> Tensor:
        """The view of this piece inside a tensor shaped like the parameter (weight, gradient or moment)."""
        return whole if self.index is None else whole[self.index]


def stacked_parameters(model: nn.Module) -> dict[str, range]:
    """Paths of the parameters that hold experts, with the global ids held here (maybe none)."""
    return {
        f"{path}.{name}": module.expert_ids
        for path, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }


def global_tensors(model: nn.Module) -> Iterator[GlobalTensor]:
    """Every piece held here, in the order of the model."""
    stacked = stacked_parameters(model)
    for path, _ in model.named_parameters():
        if path not in stacked:
            yield GlobalTensor(path, path, None)
            continue
        for index, expert in enumerate(stacked[path]):
            yield GlobalTensor(f"{path}#{expert}", path, index)


def global_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state, by global name; every rank holds them whole."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
