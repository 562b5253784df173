"""Batches made ahead, in a thread, while the present one is trained on.

What is made ahead leaves no trace in the cursor: every batch travels with the state that follows it, and the state that
a checkpoint gets is that of the last batch handed out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from data_pipeline.loader import Batch, BatchLoader


class Prefetch:
    """A loader's batches, the next ones of which are made ahead.

    Args:
        loader: Used by the thread alone from the first batch on.
        ahead: Batches made ahead; 0 makes each when it is asked for, without a thread.
    """

    def __init__(self, loader: BatchLoader, ahead: int) -> None:
        self._loader, self._ahead = loader, ahead
        self._state = loader.state_dict()
        self._work: _Work | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            batch = next(self._loader)
            self._state = self._loader.state_dict()
            return batch
        if self._work is None:
            self._work = _Work(self._loader, self._ahead)
        try:
            batch, self._state = self._work.take()
        except BaseException:  # the thread has ended; whoever goes on all the same begins with this batch again
            self.load_state_dict(self._state)
            raise
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on after the last batch handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; what was made ahead is thrown away.

        Raises:
            CheckpointError: The state belongs to another order.
        """
        self.close()
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()

    def close(self) -> None:
        """Ends the thread, after the batch it is at."""
        if self._work is not None:
            self._work.stop()
            self._work = None


class _Work:
    """A thread that stays so many batches ahead. It is a daemon: it never keeps a process alive."""

    def __init__(self, loader: BatchLoader, ahead: int) -> None:
        self._loader = loader
        self._room = threading.Semaphore(ahead)
        self._made: queue.SimpleQueue[tuple[Batch, dict[str, Any]] | BaseException] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="batches made ahead", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Batch, dict[str, Any]]:
        """The next batch and the state after it, or the error that came of making it."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        self._room.release()
        return made

    def stop(self) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join()

    def _run(self) -> None:
        while self._room.acquire() and not self._stopped:
            try:
                self._made.put((next(self._loader), self._loader.state_dict()))
            except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
                self._made.put(error)
                return
