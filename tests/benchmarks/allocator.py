"""Settings of glibc's allocator and of OpenMP for benchmarks, which a process can only be born with.

By default glibc maps every large block anew and gives it back when it is freed, so that a layer pays for page faults
rather than for arithmetic. Benchmarks measure under the settings that training runs under (`launch/environment.py`).
"""

from __future__ import annotations

import os
import sys

# Freed blocks stay with the process: no page is asked for twice. For clocks.
# Torch asks for large pages: with small ones a product waits for the address translation (docs/log.md). Idle OpenMP
# threads sleep after some 0.2 ms: by default they keep a core busy for milliseconds.
KEEP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "THP_MEM_ALLOC_ENABLE": "1",
    "GOMP_SPINCOUNT": "10000",
}
# Blocks of 64 KiB and more go back when they are freed: resident memory is what is alive. For peak memory.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}


def restart_with_kept_blocks() -> dict[str, str]:
    """Starts this program again with `KEEP` where one of its variables is unset; one that is set is left alone.

    Returns:
        The settings this process has.
    """
    missing = {name: value for name, value in KEEP.items() if name not in os.environ}
    if missing:
        settings = " ".join(f"{name}={value}" for name, value in missing.items())
        print(f"starting again with {settings}", file=sys.stderr, flush=True)
        os.execve(sys.executable, sys.orig_argv, os.environ | missing)
    return {name: os.environ[name] for name in KEEP}
