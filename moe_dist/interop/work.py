"""Work that a kill may cut short: a hidden folder beside what it becomes, in which files that are done are known again.

.importing-step-00000000/plan.json                             what is made of what; another plan begins anew
.importing-step-00000000/part-00000-of-00002.safetensors       done, for there is
.importing-step-00000000/part-00000-of-00002.safetensors.done  what is to be known of it
.importing-step-00000000/part-00001-of-00002.safetensors.new   under way; written anew
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.store import sync_folder, write_durably
from moe_dist.errors import ExchangeError

_PLAN, _DONE, _NEW = "plan.json", ".done", ".new"


class Work:
    """One piece of work in its folder; made by `begin`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, 0

    def file(self, name: str, make: Callable[[Path], Any]) -> Any:
        """Makes a file, unless it is done already.

        Args:
            name: Of the file.
            make: Writes it under a new name, durably, and returns what is to be known of it, as JSON.

        Returns:
            What is to be known of it.
        """
        done = self.folder / (name + _DONE)
        if done.exists() and (self.folder / name).exists():
            self.kept += 1
            return json.loads(done.read_bytes())
        new = self.folder / (name + _NEW)
        new.unlink(missing_ok=True)
        told = make(new)
        new.rename(self.folder / name)
        sync_folder(self.folder)
        draft = self.folder / (name + _DONE + _NEW)
        write_durably(draft, json.dumps(told).encode())
        draft.rename(done)
        return told

    def tidy(self) -> None:
        """Removes all that is not to stay: the plan, and what was noted of files."""
        for path in self.folder.iterdir():
            if path.name == _PLAN or path.name.endswith((_DONE, _NEW)):
                path.unlink()


@contextmanager
def begin(folder: Path, plan: Any, needed: int = 0) -> Iterator[Work]:
    """Opens the folder of a piece of work, with what is done of the same plan; only one process at a time works in it.

    Args:
        folder: Hidden, beside what it becomes.
        plan: What is made of what, as JSON.
        needed: Bytes that all of it will take.

    Raises:
        ExchangeError: Another process works in it, or there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        text = json.dumps(plan, sort_keys=True).encode()
        found = folder / _PLAN
        if not found.exists() or found.read_bytes() != text:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            write_durably(found, text)
        left = needed - sum(path.stat().st_size for path in folder.iterdir())
        free = shutil.disk_usage(folder).free
        if free < left:
            raise ExchangeError(
                str(folder), f"{free:,} bytes free", f"{left:,} bytes are still to be written", "make room"
            )
        yield Work(folder)
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        rule = "one process at a time imports or exports to a place"
        raise ExchangeError(str(folder), "in use", rule, "wait for the other, or stop it") from None
