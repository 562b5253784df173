"""What a mistake planted in the ranks of a proof is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.verify.patches import Patch


@dataclass(frozen=True)
class Mistake:
    """A patch, the cell that is run with it, and what is to be said of it.

    Attributes:
        trap: Number of the trap (docs/numerics.md), or what it is about where there is none.
        patch: Plants it in a rank.
        place: The first stage that differs, and the group of parameters or the term.
        words: Parts of the diagnosis.
        cell: Degrees and options of the cell, but for the usual ones.
        config: Other values of the config, by dotted key.
        shipped: A peer's thread about such a mistake.
    """

    trap: str
    patch: Callable[[], Patch]
    place: tuple[str, str]
    words: tuple[str, ...]
    cell: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    shipped: str = ""
