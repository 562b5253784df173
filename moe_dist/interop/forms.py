"""How one of our tensors lies in other systems' files: reversible changes of form, no number changed.

Shape letters: D model width, F expert width, H heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """A change of form and its inverse; both work on `meta` tensors too, for shapes alone.

    Attributes:
        ours: Our tensor, from theirs in the order of their names.
        theirs: The inverse.
    """

    ours: Callable[[Sequence[Tensor]], Tensor]
    theirs: Callable[[Tensor], Sequence[Tensor]]


def joined(parts: int, dim: int = 0) -> Form:
    """Theirs are equal parts of ours: the gate and the up projection of one matrix."""
    return Form(partial(torch.cat, dim=dim), partial(torch.chunk, chunks=parts, dim=dim))


def turned(heads: int) -> Form:
    """Rows of a query or key projection whose rotary embedding pairs channels 2c and 2c + 1; ours pairs c and c + C/2.

    Every head keeps its scores: both sides of each product are permuted alike.
    """

    def ours(theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0].unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def back(ours: Tensor) -> Sequence[Tensor]:
        return [ours.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)]

    return Form(ours, back)


SAME = Form(lambda theirs: theirs[0], lambda ours: [ours])
TRANSPOSED = Form(lambda theirs: theirs[0].T, lambda ours: [ours.T])
GATE_AND_UP = joined(2)
# [2F], in turns one of the gate and one of the up projection (gpt-oss).
ALTERNATING = Form(
    lambda theirs: theirs[0].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1),
    lambda ours: [ours.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)],
)
# [D, 2F], whose columns are such.
ALTERNATING_COLUMNS = Form(lambda theirs: ALTERNATING.ours([theirs[0].T]), lambda ours: [ALTERNATING.theirs(ours)[0].T])
