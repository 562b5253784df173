"""Writing one part: its tensors are copied into one block of host memory, laid out as the file is, and written from it.

The copy is all that training waits for. Writing passes the page cache by where the file system can (O_DIRECT): a tenth
of the processor time, and nothing that the fsync at the end still has to wait for.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.header import Header, plan_header
from moe_dist.checkpoint.manifest import CHUNK_BYTES, DTYPES, hash_of

_BLOCK, _PAGE = 16 * 2**20, 4096
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has none


class Filled:
    """How many bytes from the beginning are there: those who write and hash follow the one who copies."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._bytes = 0
        self._given_up = False

    def reach(self, place: int) -> None:
        """All before `place` is there."""
        with self._changed:
            self._bytes = place
            self._changed.notify_all()

    def give_up(self) -> None:
        """There will be no more."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def wait_for(self, place: int) -> None:
        """Waits until all before `place` is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes >= place or self._given_up)
            if self._bytes < place:
                raise RuntimeError("the state could not be copied")


class HostCopy:
    """A part in host memory, kept from save to save: a second one is never needed, and new pages are slow to come by.

    Pinned where the tensors are on a GPU; else in large pages where the system has them.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._filled = Filled()
        self.header = Header(b"", {}, "")

    def begin(self, shapes: dict[str, tuple[torch.Size, torch.dtype]], save: str, step: int, pinned: bool) -> None:
        """Plans the part and finds room for it; `write` may follow at once, on another thread."""
        self.header, self._filled = plan_header(shapes, {"save": save, "step": str(step)}), Filled()
        size = -(-self.num_bytes // _PAGE) * _PAGE
        if self._memory is None or len(self._memory) < size:
            self._memory = None
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pinned else _large_pages(size)
        content = torch.frombuffer(bytearray(self.header.content), dtype=torch.uint8)
        self._memory[: len(content)].copy_(content)

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies the tensors to their places and returns when they are there."""
        try:
            self._fill(tensors)
        except BaseException:
            self._filled.give_up()
            raise

    def _fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        assert self._memory is not None, "a copy is begun before it is filled"
        memory = memoryview(self._memory.numpy())  # type: ignore[arg-type]
        in_order = deque(self.header.tensors.values())
        here: set[int] = set()
        on_device = False
        for name, tensor in tensors:
            place = self.header.tensors[name]
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                # By one thread: for a megabyte at a time torch's threads wait longer for each other than they copy.
                memory[place["start"] : place["end"]] = bytes_of(tensor)
            else:
                target = self._memory[place["start"] : place["end"]].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor, non_blocking=True)
                on_device = on_device or tensor.device.type != "cpu"
            here.add(place["start"])
            while in_order and in_order[0]["start"] in here and not on_device:
                self._filled.reach(in_order.popleft()["end"])
        if on_device:
            torch.accelerator.synchronize()
        self._filled.reach(self.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return max((place["end"] for place in self.header.tensors.values()), default=len(self.header.content))

    def write(self, file: Path) -> dict[str, Any]:
        """Writes the part durably, while it is being filled; returns its entry of the manifest."""
        assert self._memory is not None, "a copy is begun before it is written"
        memory = memoryview(self._memory.numpy())  # type: ignore[arg-type]
        with ThreadPoolExecutor(1, "checkpoint-hashes") as beside:
            hashed = beside.submit(self._hash, memory)
            write_file(file, memory, self.num_bytes, self._filled.wait_for)
            return part_entry(file.name, file.stat().st_size, self.header, hashed.result())

    def proven(self, name: str) -> tuple[dict[str, Any], memoryview]:
        """The filled part as it would lie in a file of this name: its entry of the manifest, and its bytes."""
        assert self._memory is not None, "a copy is begun and filled before it is given away"
        memory = memoryview(self._memory.numpy())[: self.num_bytes]  # type: ignore[arg-type]
        return part_entry(name, self.num_bytes, self.header, self._hash(memory)), memory

    def _hash(self, memory: memoryview) -> dict[str, Any]:
        tensors = {}
        for name, place in self.header.tensors.items():
            self._filled.wait_for(place["end"])
            tensors[name] = {**place, "hashes": hashes_of(memory[place["start"] : place["end"]])}
        return tensors


def part_entry(name: str, size: int, header: Header, tensors: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of a part."""
    begin = {"header_bytes": len(header.content), "header_hash": hash_of(header.content)}
    return {"file": name, "bytes": size, **begin, "tensors": tensors}


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def hashes_of(content: memoryview) -> list[str]:
    """XXH3-128 of every chunk."""
    return [hash_of(content[first : first + CHUNK_BYTES]) for first in range(0, len(content), CHUNK_BYTES)]


def write_file(file: Path, memory: memoryview, size: int, wait_for: Callable[[int], None]) -> None:
    """Writes the first `size` bytes of page-aligned memory, which is as long as whole pages, and waits for the disk.

    Args:
        file: A new file.
        memory: The bytes.
        size: How many of them.
        wait_for: Waits until so many of them are there.
    """
    handle = _open_for_writing(file)
    try:
        done, padded = 0, -(-size // _PAGE) * _PAGE
        while done < padded:
            block = memory[done : min(done + _BLOCK, padded)]
            wait_for(min(done + len(block), size))
            try:
                done += os.write(handle, block)
            except OSError as error:
                if error.errno != errno.EINVAL or not _is_direct(handle):
                    raise
                # This file system wants other addresses or lengths: through the page cache then.
                fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~_DIRECT)
        os.ftruncate(handle, size)
        os.fsync(handle)
    finally:
        os.close(handle)


def stream_file(file: Path, header: Header, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Writes a part tensor by tensor, in the header's order; returns its entry of the manifest."""
    hashed: dict[str, Any] = {}
    with file.open("xb") as handle:
        handle.write(header.content)
        for name, tensor in tensors:
            content = bytes_of(tensor.contiguous())
            assert handle.tell() == header.tensors[name]["start"] and tensor.dtype in DTYPES.values()
            handle.write(content)
            hashed[name] = {**header.tensors[name], "hashes": hashes_of(content)}
        handle.flush()
        os.fsync(handle.fileno())
    return part_entry(file.name, file.stat().st_size, header, hashed)


def _open_for_writing(file: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(file, flags | _DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    file.unlink(missing_ok=True)  # it was created before the flag was refused
    return os.open(file, flags, 0o644)


def _is_direct(handle: int) -> bool:
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & _DIRECT)


def _large_pages(size: int) -> Tensor:
    memory = mmap.mmap(-1, max(size, _PAGE))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
