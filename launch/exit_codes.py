"""The exit codes of `moe-dist`: the one table that the command line, docs/operations.md and tests go by.

Named errors carry their code (`moe_dist/errors.py`); a test holds them, this table and the page together.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, code)
        member._value_, member.meaning = code, meaning
        return member

    DONE = 0, "done"
    FAILED = 1, "a proof or check failed, or a bug (with its traceback)"
    WRONG_INPUT = 2, "the input is wrong: config key, file, option, layout; nothing was started"
    NO_CHECKPOINT = 3, "no usable checkpoint, or one could not be written"
    TRAINING_FAILED = 4, "training failed: an invariant that does not hold, or workers that failed too often"
    NOT_FINITE = (
        5,
        "numbers are not finite: loss or gradient in several steps in a row, or a state that was to be saved",
    )
    INTERRUPTED = 130, "interrupted (Ctrl-C or SIGTERM); a checkpoint was written and the same command continues"


def table() -> str:
    """The table of docs/operations.md."""
    rows = [f"| {code.value} | {code.meaning} |" for code in ExitCode]
    return "\n".join(["| code | meaning |", "|---|---|", *rows])
