"""One launcher a run: the second is refused while the first lives, however the first may end."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from moe_dist.errors import ConfigError

LOCK_FILE = "launcher.lock"


@contextlib.contextmanager
def only_launcher(run_dir: Path) -> Iterator[None]:
    """Holds the run's directory; the kernel lets go of it when this process ends, even by SIGKILL.

    Raises:
        ConfigError: Another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                "run.dir",
                str(run_dir),
                f"a run has one launcher at a time; at work is {file.read().strip() or 'another process'}",
                "wait for it, end it, or choose another run.dir",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} of {os.uname().nodename}\n")
        file.flush()
        yield
