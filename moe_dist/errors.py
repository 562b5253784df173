"""Named errors. A person's mistake is reported as: where, the value found, the rule, and the nearest fix.

Every error a user can cause derives from `MoeDistError`; the command line prints its four lines without a traceback
and ends with its `exit_code` (documented in docs/operations.md). Anything else that is raised is a bug of ours.
"""

from __future__ import annotations


class MoeDistError(Exception):
    """A mistake or a fault that the user can act on.

    Args:
        where: The config key, file, tensor or option concerned.
        value: What was found there.
        rule: The rule it breaks.
        fix: The nearest thing to do about it.
    """

    exit_code = 2

    def __init__(self, where: str, value: object, rule: str, fix: str) -> None:
        super().__init__(where, value, rule, fix)
        self.where, self.value, self.rule, self.fix = where, value, rule, fix

    def __str__(self) -> str:
        shown = f"{self.value}"
        if len(shown) > 300:
            shown = shown[:300] + f"... ({len(shown)} characters)"
        lines = (f"where  {self.where}", f"value  {shown}", f"rule   {self.rule}", f"fix    {self.fix}")
        return f"{type(self).__name__}\n  " + "\n  ".join(lines)


class ConfigError(MoeDistError):
    """A key, type, range or combination of the configuration that is not allowed."""


class DataError(MoeDistError):
    """Input text, a tokenizer or a shard that is missing, unreadable or damaged."""


class ShardError(DataError):
    """A shard of a build that is missing or not as its manifest says; `data.damaged_shards` may train without it."""


class StorageError(DataError):
    """Storage of the input that does not answer, refuses, or changes under the reader; no `skip` passes over it."""


class LayoutError(MoeDistError):
    """A parallel layout that this number of ranks or this model cannot take."""


class CheckpointError(MoeDistError):
    """A checkpoint that is missing, incomplete, damaged, or of another model or data order."""

    exit_code = 3


class LedgerError(MoeDistError):
    """A routing ledger that is missing, damaged, or of another model, data or seed."""


class ExchangeError(MoeDistError):
    """Weights of another system that are damaged, unsafe to read, or of a model that is not carried as it is."""


class TrainingFault(MoeDistError):
    """Training cannot go on: an invariant that does not hold (train/checks.py), or workers that failed too often."""

    exit_code = 4


class NumericFault(TrainingFault):
    """Numbers that are not finite: steps in a row, or weights that would have been saved (train/nonfinite.py)."""

    exit_code = 5


class Interrupted(MoeDistError):
    """The user asked the run to stop; the last checkpoint is committed and the same command continues it."""

    exit_code = 130
