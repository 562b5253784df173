"""A state that may be gone on from, wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moe_dist.checkpoint.manifest import Manifest
from moe_dist.checkpoint.opened import Opened

Opens = Callable[[Path], Opened]


@dataclass(frozen=True)
class Source:
    """A state.

    Attributes:
        path: Where it lies, for messages.
        step: Updates made.
        distance: Of several after the same step the nearest is taken: 0 memory, 1 disk, 2 object store.
        manifest: Reads and proves its manifest.
        opens: Finds what opens its parts by their file names.
        key: Which state in memory it is.
        record: Rows of the run's record that lie with it and on no disk.
    """

    path: Path
    step: int
    distance: int
    manifest: Callable[[], Manifest]
    opens: Callable[[], Opens]
    key: Any = None
    record: list[Any] = field(default_factory=list)


class Elsewhere(Protocol):
    """A place of states besides the run's directory.

    Attributes:
        name: For messages.
        lasting: Whether its states outlive the run's processes: then a run may not begin anew while it is not known.
    """

    name: str
    lasting: bool

    def find(self) -> Sequence[Any]:
        """On one rank: what is there, as values that all ranks are then told."""

    def source(self, found: Any) -> Source:
        """On every rank: one of them."""
