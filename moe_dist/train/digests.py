"""What this rank holds of the model, under names that say who else holds the same, each as a 64-bit digest.

Identity is global: two ranks that hold a piece of the same name, expert and part hold copies of one tensor, whatever
process group sums its gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.model.naming import global_buffers, global_tensors
from moe_dist.model.transformer import Transformer
from moe_dist.moe.randomness import random_bits
from moe_dist.parallel.fsdp import local, rows_here

_WORDS_AT_ONCE = 2**20
_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # wider ones hide a pair of changed signs


class Piece(NamedTuple):
    """What a rank holds of a parameter or buffer.

    Attributes:
        module: Path of the module that owns it.
        name: Its name there.
        expert: Global id of the expert, where it is of one.
        part: Which of `parts` equal parts of the whole it is.
        parts: 1 for the whole.
        rows: (first, end) where ranks share out even this part, by rows.
    """

    module: str
    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        expert = "" if self.expert is None else f"#{self.expert}"
        part = "" if self.parts == 1 else f" (part {self.part + 1} of {self.parts})"
        rows = "" if self.rows is None else f" (rows {self.rows[0]} to {self.rows[1] - 1})"
        return f"{self.module}.{self.name}{expert}{part}{rows}"


def pieces_here(model: Transformer) -> dict[Piece, Tensor]:
    """Every parameter and buffer held here, in the order of the model; of experts each by itself."""
    found: dict[Piece, Tensor] = {}
    for held in global_tensors(model):
        module, _, name = held.parameter.rpartition(".")
        expert = int(held.name.rpartition("#")[2]) if held.index is not None else None
        part, parts = (0, 1) if held.cut is None else (held.cut.place, held.cut.parts)
        parameter = model.get_parameter(held.parameter)
        here, rows = local(parameter), rows_here(parameter)
        if held.index is None:
            shared_out = len(rows) < len(parameter)
            found[Piece(module, name, expert, part, parts, (rows.start, rows.stop) if shared_out else None)] = here
        elif held.index in rows:  # of stacked experts whole ones are shared out
            found[Piece(module, name, expert, part, parts)] = here[held.index - rows.start]
    for path, buffer in global_buffers(model).items():
        module, _, name = path.rpartition(".")
        found[Piece(module, name)] = buffer
    return found


def digests_here(model: Transformer) -> dict[Piece, int]:
    """The digest of every piece held here."""
    return dict(zip(found := pieces_here(model), digests_of(list(found.values())), strict=True))


@torch.no_grad()
def digests_of(tensors: list[Tensor]) -> list[int]:
    """64 bits of each tensor, made where it is: its words times odd random numbers of their places, modulo 2^64.

    An odd factor loses no bit, so that one word that differs always shows; several do but for a chance below 2^-32.
    """
    if not tensors:
        return []
    factor = random_bits(torch.arange(_WORDS_AT_ONCE, device=tensors[0].device)) | 1
    return torch.stack([_digest(tensor, factor) for tensor in tensors]).tolist()


def _digest(tensor: Tensor, factor: Tensor) -> Tensor:
    words = tensor.contiguous().view(-1).view(_WORD[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=factor.device)
    for number, part in enumerate(words.split(len(factor))):
        total += (part * factor[: len(part)]).sum() * (2 * number + 1)
    return total
