"""What went wrong in a rank, in a form that crosses a process boundary, and which of several errors came first.

An error travels as plain text fields, never as a pickle: a run directory may come from a stranger.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from moe_dist import errors
from moe_dist.errors import MoeDistError, TrainingFault

_NAMED = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, MoeDistError)
}


class RankCrash(RuntimeError):
    """An unexpected error in a rank: a bug of ours. Its text is the rank's own traceback."""


@dataclasses.dataclass(frozen=True)
class RankError:
    """An error of one rank.

    Args:
        rank: The rank that raised it.
        time: When, in seconds since the epoch.
        kind: Name of the exception's class.
        fields: where, value, rule and fix of a `MoeDistError`; None for any other exception.
        text: The exception's message.
        trace: The traceback as text.
    """

    rank: int
    time: float
    kind: str
    fields: tuple[str, str, str, str] | None
    text: str
    trace: str

    @classmethod
    def caught(cls, rank: int, error: BaseException) -> RankError:
        """Records the exception that a rank is handling now."""
        fields = None
        if isinstance(error, MoeDistError):
            fields = (error.where, str(error.value), error.rule, error.fix)
        trace = "".join(traceback.format_exception(error))
        return cls(rank, time.time(), type(error).__name__, fields, str(error), trace)

    @classmethod
    def killed(cls, rank: int, how: str) -> RankError:
        """Records a rank that ended without a word."""
        fields = (
            f"rank {rank}",
            how,
            "every rank lives until the run ends",
            "look for a kill or a lack of memory on that machine; the same command continues from the last checkpoint",
        )
        return cls(rank, time.time(), TrainingFault.__name__, fields, how, "")

    @property
    def lost(self) -> bool:
        """Whether the rank ended without a word."""
        return self.fields is not None and not self.trace

    def exception(self) -> Exception:
        """The exception to show: a named error as itself, anything else as a `RankCrash`."""
        if self.fields is None:
            return RankCrash(f"rank {self.rank} raised {self.kind}: {self.text}\n\n{self.trace}")
        return _NAMED.get(self.kind, MoeDistError)(*self.fields)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankError:
        """The inverse of `to_json`."""
        record = json.loads(text)
        fields = record.pop("fields")
        return cls(fields=tuple(fields) if fields else None, **record)


def first_cause(found: Iterable[RankError]) -> RankError:
    """The error to show: a named one before a crash (peers crash on a lost connection), then the earliest."""
    return min(found, key=lambda error: (error.fields is None, _is_echo(error), error.time))


def in_a_line(error: Exception) -> str:
    """Where and what, for a message."""
    where, value = getattr(error, "where", ""), getattr(error, "value", str(error))
    return f"{where}: {' '.join(str(value).split())[:200]}"


def write_once(path: Path, error: RankError) -> None:
    """Writes the first error of a gang; later ones are consequences and change nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{error.rank}.{os.getpid()}")
    draft.write_text(error.to_json(), encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def read_once(path: Path) -> RankError | None:
    """The error that `write_once` left, or None."""
    try:
        return RankError.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _is_echo(error: RankError) -> bool:
    """Whether this looks like what a rank sees when another one is gone."""
    signs = ("connection", "peer", "gloo", "nccl", "store", "timed out", "process group")
    return any(sign in error.text.lower() for sign in signs)
