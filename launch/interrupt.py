"""Ctrl-C and SIGTERM: the first asks for a checkpoint and an end, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

STOP_FILE = "stop-requested"


def to_stderr(text: str) -> None:
    """Shows a line where no display is open."""
    print(text, file=sys.stderr, flush=True)


class StopRequest:
    """Turns signals into the stop file that every rank looks for after each step.

    The signal handlers only count; `abort_asked`, which the waiting launcher calls again and again, does the work.
    Outside the main thread, where Python allows no handlers, only the stale stop file is removed.

    Args:
        run_dir: The run's directory.
        say: Shows a line to the person.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._file = run_dir / STOP_FILE
        self._say = say
        self._signals = 0
        self._asked = False
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._file.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._file.unlink(missing_ok=True)

    def abort_asked(self) -> bool:
        """Asks the ranks to stop after the first signal; returns whether a second one came."""
        if self._signals and not self._asked:
            self._asked = True
            self.ask_ranks()
            self._say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")
        return self._signals > 1

    @property
    def asked(self) -> bool:
        """Whether the person asked to stop."""
        return self._signals > 0

    def ask_ranks(self) -> None:
        """Asks the ranks to save and end, as a signal does, for reasons of the launcher's own."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.touch()

    def withdraw(self) -> None:
        """Lets ranks that are started now go on, unless the person asked to stop."""
        if not self._signals:
            self._file.unlink(missing_ok=True)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1


def heed_signals_of_a_rank(run_dir: Path) -> None:
    """In a rank's own process: a SIGTERM that reaches it alone asks all ranks to stop, a second one ends it at once.

    Ctrl-C at a terminal reaches the whole group, whose launcher decides; ranks let it pass.
    """
    received = 0

    def asked(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received > 1:
            os._exit(128 + signal.SIGTERM)
        with contextlib.suppress(OSError):
            (run_dir / STOP_FILE).touch()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, asked)
