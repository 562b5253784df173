"""Safetensors files of a hub directory, read as if a stranger had made them, and written tensor by tensor.

No file outside the directory is opened, no link is followed, and no number of a header is taken on trust.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.header import Header, read_header
from moe_dist.checkpoint.manifest import DTYPES, open_regular, parse_json
from moe_dist.checkpoint.opened import OpenFile
from moe_dist.checkpoint.write import bytes_of
from moe_dist.errors import CheckpointError, ExchangeError
from moe_dist.interop.names import Key

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors\Z")
_MOST_JSON_BYTES = 64 * 2**20
_COPY = "fetch the directory anew; where its files are links (a cache), copy it with `cp -rL`"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its file, type, shape and bytes."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Shards:
    """The tensors of a directory by name; a context manager that keeps the files open.

    Attributes:
        places: Of every tensor.
        seen: What the files are, to know them again: name, size, time of change, header.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Place] = {}
        self.seen: list[Any] = []
        self._open: dict[str, int] = {}

    def __enter__(self) -> Shards:
        try:
            self._read_headers()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close()

    def read(self, key: Key) -> Tensor:
        """A tensor, or one row of it.

        Raises:
            ExchangeError: The file is shorter by now.
        """
        place = self.places[key.name]
        shape, start, end = place.shape, place.start, place.end
        if key.row is not None:
            size = (end - start) // shape[0]
            shape, start = shape[1:], start + key.row * size
            end = start + size
        value = torch.empty(shape, dtype=place.dtype)
        into, done = bytes_of(value), 0
        while done < end - start:
            got = os.preadv(self._open[place.file], [into[done:]], start + done)
            if not got:
                raise ExchangeError(f"{self.folder / place.file}: {key.name}", "shorter", "no file changes", _COPY)
            done += got
        return value

    def names(self) -> Iterable[str]:
        return self.places

    def rows(self, name: str) -> int:
        """Rows of a tensor in which experts are stacked; 0 where it has none."""
        return next(iter(self.places[name].shape), 0)

    def shape(self, key: Key) -> tuple[int, ...]:
        """Of a tensor or of a row of it."""
        shape = self.places[key.name].shape
        return shape if key.row is None else shape[1:]

    def _read_headers(self) -> None:
        index = self._read_index()
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            for name, place in self._read_file(file).items():
                if name in self.places:
                    rule = "every tensor is in one file"
                    raise ExchangeError(f"{self.folder}: {name}", f"{file}, {self.places[name].file}", rule, _COPY)
                self.places[name] = place
        told = index or {name: place.file for name, place in self.places.items()}
        for name in sorted(told.keys() | self.places.keys()):
            found = self.places[name].file if name in self.places else None
            if told.get(name) != found:
                rule = f"the index says {told.get(name)}"
                raise ExchangeError(f"{self.folder}: {name[:200]}", f"in {found}", rule, _COPY)

    def _read_index(self) -> dict[str, str] | None:
        """Which file each tensor is in; None where there is one file and no index."""
        if not os.path.lexists(self.folder / INDEX):
            if not os.path.lexists(self.folder / SINGLE):
                rule = f"a directory has {SINGLE} or {INDEX}; pickles (pytorch_model.bin) are not read"
                raise ExchangeError(str(self.folder), "neither", rule, "save it as safetensors")
            return None
        told = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(told, dict) or not told:
            raise ExchangeError(str(self.folder / INDEX), "no weight_map", "it names the file of each tensor", _COPY)
        for name, file in told.items():
            if not isinstance(file, str) or not _FILE.match(file) or ".." in file:
                rule = "a file of the index is the name of a .safetensors file beside it, without any folder"
                raise ExchangeError(f"{self.folder / INDEX}: {name[:200]}", repr(file)[:200], rule, _COPY)
        return told

    def _read_file(self, file: str) -> dict[str, Place]:
        path = self.folder / file
        handle = self._open[file] = _open(path)
        try:
            header = read_header(OpenFile(handle), path)
        except CheckpointError as error:
            raise ExchangeError(error.where, error.value, error.rule, _COPY) from None
        status = os.fstat(handle)
        self.seen.append([file, status.st_size, status.st_mtime_ns, len(header.content)])
        return _checked(header, status.st_size, path)

    def _close(self) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()


def _checked(header: Header, size: int, path: Path) -> dict[str, Place]:
    """The tensors of a file, which fill it without gap or overlap."""
    found: dict[str, Place] = {}
    end = len(header.content)
    for name, told in sorted(header.tensors.items(), key=lambda item: (item[1]["start"], item[1]["end"])):
        where = f"{path}: {name[:200]}"
        if told["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise ExchangeError(where, repr(told["dtype"])[:200], f"a type that is carried: {known}", "weights of bf16")
        dtype = DTYPES[told["dtype"]]
        if told["start"] != end or told["end"] - end != math.prod(told["shape"]) * dtype.itemsize:
            value = f"bytes {told['start']} to {told['end']}, shape {told['shape']}, {told['dtype']}"
            raise ExchangeError(where, value[:200], f"it fills the file from byte {end} on, no gap, no overlap", _COPY)
        end = told["end"]
        found[name] = Place(path.name, dtype, tuple(told["shape"]), told["start"], end)
    if end != size:
        raise ExchangeError(str(path), f"{size:,} bytes", f"the tensors end at byte {end:,}", _COPY)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small regular file.

    Raises:
        ExchangeError: It is none.
    """
    try:
        return parse_json(read_small(path), str(path))
    except CheckpointError as error:
        raise ExchangeError(error.where, error.value, error.rule, _COPY) from None


def read_small(path: Path) -> bytes:
    """The content of a small regular file.

    Raises:
        ExchangeError: It is missing, a link or something else, or not small.
    """
    with os.fdopen(_open(path), "rb") as file:
        content = file.read(_MOST_JSON_BYTES + 1)
    if len(content) > _MOST_JSON_BYTES:
        raise ExchangeError(str(path), "longer", f"such a file has at most {_MOST_JSON_BYTES:,} bytes", _COPY)
    return content


def _open(path: Path) -> int:
    try:
        return open_regular(path)
    except CheckpointError as error:
        rule = "the files of a directory are regular files in it, and no links"
        raise ExchangeError(error.where, error.value, rule, _COPY) from None


def write_shard(file: Path, header: Header, pieces: Iterable[Tensor]) -> None:
    """Writes a file from its tensors (or rows of them, one after the other) in the header's order, durably."""
    with file.open("xb") as handle:
        handle.write(header.content)
        for piece in pieces:
            handle.write(bytes_of(piece.contiguous()))
        handle.flush()
        os.fsync(handle.fileno())
        end = max((place["end"] for place in header.tensors.values()), default=len(header.content))
        assert handle.tell() == end, f"{file}: {handle.tell()} bytes written, {end} planned"
