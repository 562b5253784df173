"""Global names: what a parameter is called whatever rank holds it.

A dense parameter keeps its module path. A stacked expert parameter is one tensor an expert, named by global expert id:
`blocks.3.feed_forward.experts.down#17`. A buffer (a router's selection bias) keeps its module path. A tensor of which
a rank holds a cut keeps the name of the whole: the module that owns it says which cut it is, in `cuts`.
Initial weights, checkpoints and proofs speak only of these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor, nn

from moe_dist.moe.experts import Experts


@dataclass(frozen=True)
class Cut:
    """Which part of a globally named tensor is held.

    Attributes:
        dim: The dimension that is cut.
        parts: Equal parts that it is cut into.
        place: The part that is held.
        sections: Neighbouring blocks that are each cut alike, as the gate and the up projection of one matrix are.
    """

    dim: int
    parts: int
    place: int
    sections: int = 1

    def take(self, whole: Tensor) -> Tensor:
        """The part that is held."""
        blocks = whole.chunk(self.sections, self.dim)
        return torch.cat([block.chunk(self.parts, self.dim)[self.place] for block in blocks], self.dim)

    def join(self, held: list[Tensor]) -> Tensor:
        """The whole, from the parts in order of place."""
        by_place = [part.chunk(self.sections, self.dim) for part in held]
        return torch.cat([blocks[s] for s in range(self.sections) for blocks in by_place], self.dim)

    def whole_shape(self, held: torch.Size) -> torch.Size:
        """The shape of the whole."""
        return torch.Size(size * self.parts if dim == self.dim else size for dim, size in enumerate(held))


@dataclass(frozen=True)
class GlobalTensor:
    """One globally named piece of a parameter held here.

    Attributes:
        name: Global name, with `#expert` for a piece of a stacked parameter.
        parameter: Path of the module parameter it is a piece of.
        index: Position inside the stacked parameter; None for a dense one.
        cut: Which part of it is held; None for all of it.
    """

    name: str
    parameter: str
    index: int | None
    cut: Cut | None = None

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
        cut = cut_of(model, path)
        if path not in stacked:
            yield GlobalTensor(path, path, None, cut)
            continue
        for index, expert in enumerate(stacked[path]):
            yield GlobalTensor(f"{path}#{expert}", path, index, cut)


def pieces_by_parameter(model: nn.Module) -> Iterator[tuple[str, list[GlobalTensor]]]:
    """Every parameter that holds pieces here, by its path, with them."""
    for path, pieces in groupby(global_tensors(model), attrgetter("parameter")):
        yield path, list(pieces)


def cut_of(model: nn.Module, path: str) -> Cut | None:
    """Which part of a parameter (of each expert, of a stacked one) is held; None for all of it."""
    owner, _, name = path.rpartition(".")
    cuts: dict[str, Cut] = getattr(model.get_submodule(owner), "cuts", {})
    return cuts.get(name)


def global_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state, by global name; every rank holds them whole."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
