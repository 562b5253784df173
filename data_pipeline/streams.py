"""Files as streams of bytes, decompressed in bounded memory, and streams cut into lines.

A chunk comes with the number of bytes of the file that it was made from: by it, a line that is a bomb (megabytes out of
kilobytes) is known before it fills memory.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import zstandard

from data_pipeline.listing import InputFile
from data_pipeline.storage import StoredObject, open_object
from moe_dist.errors import DataError

READ_BYTES = 256 * 2**10
MAX_RECORD_BYTES = 64 * 2**20
MAX_DENSE_BYTES = 16 * 2**20  # limit for a line that expands more than `MAX_EXPANSION`-fold, as no text does
MAX_EXPANSION = 200
_ZST_FEED_BYTES = 512  # zstd's densest block makes 128 KiB out of 4 bytes: this bounds one step's output to 16 MiB
_ZST_WINDOW_BYTES = 2**27
_GZ_STEP_BYTES = 2**20
_GZ_WITH_HEADER = 16 + zlib.MAX_WBITS

Chunk = tuple[bytes, int]


@contextlib.contextmanager
def open_file(file: InputFile) -> Iterator[BinaryIO]:
    """Opens a listed file for reading, on this machine or in its store.

    Raises:
        OSError: A file of this machine cannot be opened.
        StorageError: An object cannot be read, or is not the one that was listed.
    """
    if not file.store:
        with open(file.path, "rb") as source:
            yield source
        return
    seen = StoredObject(file.path, file.size_bytes, file.mtime_ns)
    with open_object(file.store, seen, file.version) as stored:
        yield stored


def chunks_of(file: InputFile) -> Iterator[Chunk]:
    """Yields the contents of a file, decompressed by its kind: parts with the bytes of the file each was made from.

    Raises:
        DataError: A compressed stream is damaged, ends early, or has other bytes after it.
    """
    if file.kind.endswith(".zst"):
        yield from _zst_chunks(file)
    elif file.kind.endswith(".gz"):
        yield from _gz_chunks(file)
    else:
        with open_file(file) as source:
            while chunk := source.read(READ_BYTES):
                yield chunk, len(chunk)


def lines_of(chunks: Iterable[Chunk]) -> Iterator[tuple[bytes | None, int]]:
    """Yields (line, its length), and None for the bytes of a line over its limit, which are not kept in memory."""
    line = _Line()
    for chunk, spent in chunks:
        first, *others = chunk.split(b"\n")
        line.add(first, spent)
        if others:
            yield line.joined(), line.length
            for whole in others[:-1]:
                yield (whole if len(whole) <= MAX_RECORD_BYTES else None), len(whole)
            line = _Line()
            line.add(others[-1], spent)
    if line.length:
        yield line.joined(), line.length


class _Line:
    """A line as its parts arrive; it drops them for good when it is known to be too long."""

    def __init__(self) -> None:
        self.length = self._spent = 0
        self._parts: list[bytes] | None = []

    def add(self, piece: bytes, spent: int) -> None:
        self.length += len(piece)
        self._spent += spent
        dense = self.length > MAX_DENSE_BYTES and self.length > MAX_EXPANSION * self._spent
        if dense or self.length > MAX_RECORD_BYTES:
            self._parts = None
        elif self._parts is not None and piece:
            self._parts.append(piece)

    def joined(self) -> bytes | None:
        return None if self._parts is None else b"".join(self._parts)


def _zst_chunks(file: InputFile) -> Iterator[Chunk]:
    """Decompresses every frame; the stream must end where a frame ends (the library's own reader does not check)."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZST_WINDOW_BYTES)
    frame, frames = None, 0
    with open_file(file) as source:
        while data := source.read(_ZST_FEED_BYTES):
            while data:
                frame = frame or decompressor.decompressobj()
                try:
                    chunk = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise _damaged(
                        file, "zstd frames", f"{error} (frame {frames}, before byte {source.tell()})"
                    ) from None
                rest = frame.unused_data if frame.eof else b""
                yield chunk, len(data) - len(rest)
                data = rest
                if frame.eof:
                    frame, frames = None, frames + 1
        if frame is not None or not frames:
            raise _damaged(file, "zstd frames", f"ends inside frame {frames}, at byte {source.tell()}")


def _gz_chunks(file: InputFile) -> Iterator[Chunk]:
    """Decompresses every member, a step of output at a time; each member's checksum is checked at its end."""
    member, members = None, 0
    with open_file(file) as source:
        while data := source.read(READ_BYTES):
            more = True
            while more:
                if member is None:
                    data = data.lstrip(b"\0") if members else data  # gzip allows zeros after a member
                    if not data:
                        break
                    member = zlib.decompressobj(wbits=_GZ_WITH_HEADER)
                try:
                    chunk = member.decompress(data, _GZ_STEP_BYTES)
                except zlib.error as error:
                    found = f"{error} (member {members}, before byte {source.tell()})"
                    raise _damaged(file, "gzip members", found) from None
                rest = member.unused_data if member.eof else member.unconsumed_tail
                yield chunk, len(data) - len(rest)
                data, more = rest, bool(rest) or len(chunk) == _GZ_STEP_BYTES
                if member.eof:
                    member, members = None, members + 1
        if member is not None or not members:
            raise _damaged(file, "gzip members", f"ends inside member {members}, at byte {source.tell()}")


def _damaged(file: InputFile, parts: str, found: str) -> DataError:
    rule = f"a {file.kind[file.kind.rindex('.') :]} file is a row of whole {parts}"
    return DataError(file.id, found, rule, "fetch the file again, or data.unreadable=skip")
