"""Reading a checkpoint: every byte is proven as it is read, and only what is asked for is read.

A rank that holds a cut reads the 4 MiB chunks that its rows touch. A cut along another dimension than the first takes
one whole tensor (one expert's matrix, one moment) at a time into memory; nothing takes more.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.checkpoint.header import read_header
from moe_dist.checkpoint.manifest import CHUNK_BYTES, DTYPES, OLDER, Entry, Manifest, Part, hash_of
from moe_dist.checkpoint.opened import Opened, open_file, read_all
from moe_dist.checkpoint.write import bytes_of
from moe_dist.errors import CheckpointError
from moe_dist.model.naming import Cut

_AHEAD_BYTES = 32 * 2**20
_THREADS = 4  # that read beside: two wait for the disk while two hash
DAMAGED = "the file is damaged: use an older checkpoint"


class Reader:
    """Tensors of one checkpoint; a context manager, which keeps each part open that it has read from.

    Args:
        path: The checkpoint.
        manifest: Its proven manifest.
        beside: Chunks are read and proven by threads, several at once. What `copy` fills is then there, and damage is
            raised, only when the reader is left.
        opens: Opens a part; raises a CheckpointError where it is not there.
    """

    def __init__(
        self, path: Path, manifest: Manifest, beside: bool = False, opens: Callable[[Path], Opened] = open_file
    ) -> None:
        self.path, self.manifest, self._opens = path, manifest, opens
        self._pool = ThreadPoolExecutor(_THREADS, "checkpoint-read") if beside else None
        self._pending: deque[Future[memoryview]] = deque()
        self._open: dict[str, Opened] = {}
        self._chunk = memoryview(bytearray(0))
        self._places: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._drain(0 if kind is None else None)
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            for opened in self._open.values():
                opened.close()
            self._open.clear()

    def _drain(self, left: int | None) -> None:
        """Waits until no more than so many chunks are at work, or for none where an error is on its way already.

        Raises:
            CheckpointError: One of them is not what was written.
        """
        while left is not None and len(self._pending) > left:
            self._pending.popleft().result()

    def copy(self, name: str, target: Tensor, cut: Cut | None = None, rows: range | None = None) -> None:
        """Copies a tensor, or the part of it that is held here.

        Args:
            name: Global name with its kind, such as `model/embedding.weight`.
            target: Filled with it.
            cut: Which cut of the whole is held; None for all of it.
            rows: Which rows of what is held `target` stands for; None for all of them.

        Raises:
            CheckpointError: It is missing, damaged, or has another shape or type.
        """
        part, entry = self._entry(name)
        held = target.shape if rows is None else torch.Size([_all_rows(entry, cut), *target.shape[1:]])
        wanted = held if cut is None else cut.whole_shape(held)
        if list(wanted) != entry.shape or target.dtype != DTYPES[entry.dtype]:
            found = f"{entry.shape} {entry.dtype}"
            rule = f"the model has {list(wanted)} {target.dtype}"
            raise CheckpointError(
                f"{self.path / part.file}: {name}", found, rule, "use the config the checkpoint was made with"
            )
        if not target.numel():
            return
        spans = _spans(entry.shape, cut, range(_all_rows(entry, cut)) if rows is None else rows)
        direct = target.device.type == "cpu" and target.is_contiguous() and (cut is None or cut.dim == 0)
        if direct:
            self._fill(name, target, spans)
            return
        read = torch.empty([sum(map(len, spans)), *entry.shape[1:]] if entry.shape else [], dtype=target.dtype)
        self._fill(name, read, spans)
        self._drain(0)
        target.copy_(read if cut is None or cut.dim == 0 else cut.take(read))

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        _, entry = self._entry(name)
        value = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.copy(name, value)
        self._drain(0)
        return value

    def part(self, part: Part) -> Opened:
        """An open part whose size and header are what the manifest says.

        Raises:
            CheckpointError: They are not.
        """
        if part.file in self._open:
            return self._open[part.file]
        file = self.path / part.file
        opened = self._opens(file)
        try:
            self._check(part, opened, file)
        except BaseException:
            opened.close()
            raise
        self._open[part.file] = opened
        return opened

    def damages(self, part: Part) -> Iterator[CheckpointError]:
        """Everything in a part that is not as written: the header, or tensor after tensor."""
        try:
            self.part(part)
        except CheckpointError as error:
            yield error
            return
        for name, entry in part.tensors.items():
            try:
                for number in range(len(entry.hashes)):
                    self._proven_chunk(part, name, entry, number, None)
            except CheckpointError as error:
                yield error

    def _read_ahead(self, part: Part, opened: Opened, first: int, end: int) -> None:
        """Where reading goes on where it ended, lets the system fetch what will follow while this is hashed."""
        ended, fetched = self._places.get(part.file, (part.header_bytes, 0))
        if first == ended and end + _AHEAD_BYTES // 2 > fetched:
            opened.ahead(max(first, fetched), end + _AHEAD_BYTES)
            fetched = end + _AHEAD_BYTES
        self._places[part.file] = (end, fetched)

    def _check(self, part: Part, opened: Opened, file: Path) -> None:
        if opened.size != part.bytes:
            raise CheckpointError(str(file), f"{opened.size} bytes", f"the part has {part.bytes} bytes", OLDER)
        if part.sha256 is not None:
            found = _sha256_of(opened)
            if found != part.sha256:
                raise CheckpointError(str(file), f"{found[:16]}...", f"SHA-256 {part.sha256[:16]}...", DAMAGED)
        where = f"{file}: header"
        if hash_of(read_all(opened, 0, part.header_bytes)) != part.header_hash:
            raise CheckpointError(where, _what_it_is(opened, file, self.manifest), "it is what was written", DAMAGED)
        told = read_header(opened, file).tensors
        ours = {name: entry.model_dump(exclude={"hashes"}) for name, entry in part.tensors.items()}
        if told != ours:
            strange = sorted(name for name in told.keys() | ours.keys() if told.get(name) != ours.get(name))
            raise CheckpointError(where, f"otherwise: {strange[:3]}", "it says what the manifest says", OLDER)

    def _entry(self, name: str) -> tuple[Part, Entry]:
        if name not in self.manifest.tensors:
            rule = "the checkpoint holds every tensor of the model"
            raise CheckpointError(f"{self.path}: {name}", "missing", rule, "use a checkpoint of this model")
        return self.manifest.tensors[name]

    def _fill(self, name: str, target: Tensor, spans: list[range]) -> None:
        """Reads rows one after the other into a tensor that is in one piece, chunk by chunk."""
        part, entry = self._entry(name)
        into = bytes_of(target)
        row = entry.num_bytes // entry.shape[0] if entry.shape else entry.num_bytes
        filled = 0
        for span in spans:
            place, end = span.start * row, span.stop * row
            while place < end:
                number = place // CHUNK_BYTES
                first = number * CHUNK_BYTES
                last = min(first + CHUNK_BYTES, entry.num_bytes)
                take = min(end, last) - place
                room = into[filled : filled + take]
                if take == last - first and self._pool is not None:
                    self._begin_chunk(part, name, entry, number, room)
                elif take == last - first:
                    self._proven_chunk(part, name, entry, number, room)
                else:
                    chunk = self._proven_chunk(part, name, entry, number, None)
                    room[:] = chunk[place - first : place - first + take]
                place, filled = place + take, filled + take

    def _begin_chunk(self, part: Part, name: str, entry: Entry, number: int, into: memoryview) -> None:
        """Has a thread read and prove one chunk, once there are not too many at work."""
        assert self._pool is not None, "only a reader that reads beside begins a chunk"
        self.part(part)  # opened and compared here: threads only read
        self._drain(2 * _THREADS)
        self._pending.append(self._pool.submit(self._proven_chunk, part, name, entry, number, into))

    def _proven_chunk(self, part: Part, name: str, entry: Entry, number: int, into: memoryview | None) -> memoryview:
        """Reads one chunk, into a place of its own unless it is given another, and proves it."""
        opened = self.part(part)
        first = entry.start + number * CHUNK_BYTES
        size = min(CHUNK_BYTES, entry.end - first)
        if self._pool is None:
            self._read_ahead(part, opened, first, first + size)
        if into is None:
            if len(self._chunk) < size:
                self._chunk = memoryview(bytearray(CHUNK_BYTES))
            into = self._chunk[:size]
        where = f"{self.path / part.file}: {name}"
        done = 0
        while done < size:
            try:
                got = opened.read(into[done:], first + done)
            except OSError as error:
                raise CheckpointError(where, error, "the part is readable", OLDER) from None
            if not got:
                raise CheckpointError(where, f"{done} bytes of {size}", "the part is as long as it was", OLDER)
            done += got
        if entry.hashes and hash_of(into) != entry.hashes[number]:
            found = f"other bytes between {first:,} and {first + size:,}"
            raise CheckpointError(where, found, "its bytes are those that were written", DAMAGED)
        return into


def _sha256_of(opened: Opened) -> str:
    digest = hashlib.sha256()
    for first in range(0, opened.size, CHUNK_BYTES):
        digest.update(read_all(opened, first, CHUNK_BYTES))
    return digest.hexdigest()


def _what_it_is(opened: Opened, file: Path, manifest: Manifest) -> str:
    """A stale part is told from a damaged one by the save it names."""
    try:
        save = read_header(opened, file).save
    except CheckpointError:
        return "other bytes"
    return f"stale: of save {save[:64]!r}, not {manifest.save!r}" if save != manifest.save else "other bytes"


def _all_rows(entry: Entry, cut: Cut | None) -> int:
    """Rows of what is held, before a sharing out."""
    rows = entry.shape[0] if entry.shape else 1
    return rows // cut.parts if cut is not None and cut.dim == 0 else rows


def _spans(shape: list[int], cut: Cut | None, rows: range) -> list[range]:
    """Where rows of what is held lie in the whole, in order."""
    if cut is None or cut.dim != 0:
        return [rows]
    section = shape[0] // cut.sections
    block = section // cut.parts
    found = []
    for number in range(cut.sections):
        low, high = max(rows.start, number * block), min(rows.stop, (number + 1) * block)
        start = number * section + cut.place * block - number * block
        if low < high:
            found.append(range(start + low, start + high))
    return found


def verify(path: Path, manifest: Manifest) -> None:
    """Reads and proves every byte, and that no other part lies beside.

    Raises:
        CheckpointError: Naming the first file, and the tensor where it is one, that is not what was written.
    """
    for error in damages(path, manifest):
        raise error


def damages(path: Path, manifest: Manifest) -> Iterator[CheckpointError]:
    """All that is wrong with the files of a checkpoint."""
    for part in manifest.parts:
        with Reader(path, manifest) as reader:
            yield from reader.damages(part)
    known = {part.file for part in manifest.parts}
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in known:
            yield CheckpointError(str(file), "unexpected", "the manifest names every part", "remove the file")


def parameters_in(manifest: Manifest) -> int:
    """Numbers in all weights; the selection biases of routers are buffers and none of them."""
    weights = {name: entry for name, (_, entry) in manifest.tensors.items() if name.startswith("model/")}
    return sum(math.prod(entry.shape) for name, entry in weights.items() if not name.endswith(".selection_bias"))
