"""Doing something on one rank or on all, so that every rank hears alike whether it went well.

A rank that raised by itself would leave the others waiting in their next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_dist.errors import CheckpointError, MoeDistError
from moe_dist.parallel.collectives import from_first, gather_objects
from moe_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Outcome:
    """The result of an action, or the four parts of what went wrong, as a value that can be sent to other ranks."""

    value: Any = None
    problem: tuple[str, str, str, str] | None = None

    def error(self) -> CheckpointError | None:
        """What went wrong, if anything did."""
        return None if self.problem is None else CheckpointError(*self.problem)

    def unwrap(self) -> Any:
        """The result.

        Raises:
            CheckpointError: What went wrong.
        """
        if self.problem is not None:
            raise CheckpointError(*self.problem)
        return self.value


def on_first_rank(action: Callable[[], Any], mesh: Mesh) -> Outcome:
    """Runs an action on rank 0 and gives its outcome to all."""
    return from_first(attempt(action, 0) if mesh.rank == 0 else None, mesh.world)


def on_every_rank(action: Callable[[], Any], mesh: Mesh) -> list[Outcome]:
    """Runs an action on every rank and gives all outcomes to all, in order of rank."""
    return gather_objects(attempt(action, mesh.rank), mesh.world)


def attempt(action: Callable[[], Any], rank: int) -> Outcome:
    """What an action of one rank gives or what goes wrong in it, whatever that is."""
    try:
        return Outcome(action())
    except MoeDistError as error:
        return Outcome(problem=(error.where, str(error.value), error.rule, error.fix))
    except Exception as error:  # noqa: BLE001 - whatever a rank met, all ranks must hear of it
        fix = "make room or correct the path; the checkpoints before are intact"
        found = f"{type(error).__name__}: {error}"
        return Outcome(problem=(f"rank {rank}", found, "every rank reads and writes its part", fix))
