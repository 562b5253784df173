"""The bytes of one part, wherever they lie: a file, the memory of another process, an object store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from moe_dist.checkpoint.manifest import open_regular


class Opened(Protocol):
    """A part that can be read at any place, by several threads at once."""

    @property
    def size(self) -> int:
        """Bytes that it has."""

    def read(self, into: memoryview, at: int) -> int:
        """Reads bytes from a place on; returns how many, 0 where there are none.

        Raises:
            OSError: They cannot be read.
        """

    def ahead(self, start: int, end: int) -> None:
        """These bytes will be wanted soon."""

    def close(self) -> None:
        """Nothing more will be read."""


class OpenFile:
    """A file that is open for reading."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.size = os.fstat(self._handle).st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, into: memoryview, at: int) -> int:
        """As `Opened.read`."""
        return os.preadv(self._handle, [into], at)

    def ahead(self, start: int, end: int) -> None:
        """Has the system fetch them into its cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, start, end - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self._handle)


def open_file(file: Path) -> OpenFile:
    """A regular file.

    Raises:
        CheckpointError: It is missing or something else.
    """
    return OpenFile(open_regular(file))


def read_all(part: Opened, at: int, size: int) -> bytes:
    """So many bytes, or fewer where the part ends before."""
    content = bytearray(max(0, min(size, part.size - at)))
    view, done = memoryview(content), 0
    while done < len(content):
        got = part.read(view[done:], at + done)
        if not got:
            break
        done += got
    return bytes(content[:done])
