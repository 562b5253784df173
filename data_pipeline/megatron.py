"""Shards -> the indexed dataset of Megatron-LM: `PREFIX_<split>.bin` with tokens, `.idx` with where documents lie.

Each document is one sequence with its end-of-text, as Megatron's own preprocessing writes it with `--append-eod`. All
numbers are little-endian. The index is: 9 bytes `MMIDIDX\\0\\0`, version 1 (uint64), a code for the type of a token
(uint8), the number N of sequences and N + 1 (uint64 each); then N lengths in tokens (int32), N byte offsets into the
.bin (int64), and N + 1 numbers of sequences at which documents begin and end (int64): 0, 1, ..., N.

Source: megatron/core/datasets/indexed_dataset.py of Megatron-LM, classes `_IndexWriter` and `DType`. Departs from it in
that the index is written as the tokens are read, so that memory does not grow with the number of documents.
"""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.manifest import SPLITS, Manifest, fsync_folder
from data_pipeline.verification import damaged, open_manifest, shard_batches
from moe_dist.errors import DataError

_HEADER = b"MMIDIDX\x00\x00"
_PREAMBLE_BYTES = 34
_CODE_INT32, _CODE_UINT16 = 4, 8
_UINT16_BELOW = 65_500  # Megatron's own limit


@dataclass(frozen=True)
class _Pair:
    """The two files of one split: where they are written, and where they go."""

    prefix: Path
    mark: str

    def final(self, ending: str) -> Path:
        return self.prefix.with_name(self.prefix.name + ending)

    def aside(self, ending: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}{ending}.{self.mark}")


def export_megatron(
    folder: Path, prefix: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Writes both splits of a build. Files get their names when all of them are whole, the indices last.

    Args:
        folder: The build.
        prefix: Beginning of the four files' names.
        progress: Called with (tokens written, tokens in all).

    Returns:
        For each split: `prefix` (what Megatron's options take), `dtype`, `documents`, `tokens`.

    Raises:
        DataError: The build is damaged, a file is there already, or the disk does not allow it.
    """
    manifest = open_manifest(folder)
    mark = uuid.uuid4().hex[:12]
    pairs = {split: _Pair(prefix.with_name(f"{prefix.name}_{split}"), mark) for split in SPLITS}
    total, done = sum(manifest.num_tokens(split) for split in SPLITS), 0
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        _refuse_existing(pairs)
        for split, pair in pairs.items():
            for written in _write_split(folder, manifest, split, pair):
                done += written
                if progress is not None:
                    progress(done, total)
        _publish(pairs)
    except OSError as error:
        raise DataError(f"--out {prefix}", error, "the files can be written", "free space, or another --out") from None
    finally:
        for pair in pairs.values():
            for ending in (".bin", ".idx"):
                with contextlib.suppress(OSError):
                    pair.aside(ending).unlink()
    return {split: _summary(manifest, split, pair) for split, pair in pairs.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Type of a token in the .bin: as Megatron chooses it by the size of the vocabulary."""
    return np.dtype("<u2" if vocab_size < _UINT16_BELOW else "<i4")


def _summary(manifest: Manifest, split: str, pair: _Pair) -> dict[str, Any]:
    return {
        "prefix": str(pair.prefix),
        "dtype": token_dtype(manifest.tokenizer_size).name,
        "documents": sum(shard.documents for shard in manifest.splits[split]),
        "tokens": manifest.num_tokens(split),
    }


def _refuse_existing(pairs: dict[str, _Pair]) -> None:
    for pair in pairs.values():
        for ending in (".bin", ".idx"):
            if pair.final(ending).exists():
                rule = "an export overwrites nothing"
                raise DataError("--out", f"{pair.final(ending)} exists", rule, "another --out, or remove it")


def _publish(pairs: dict[str, _Pair]) -> None:
    _refuse_existing(pairs)
    for ending in (".bin", ".idx"):
        for pair in pairs.values():
            os.replace(pair.aside(ending), pair.final(ending))
    for folder in {pair.prefix.parent for pair in pairs.values()}:
        fsync_folder(folder)


def _write_split(folder: Path, manifest: Manifest, split: str, pair: _Pair) -> Iterator[int]:
    """Writes one split aside; yields the number of tokens of each batch when it is written."""
    dtype = token_dtype(manifest.tokenizer_size)
    documents = sum(shard.documents for shard in manifest.splits[split])
    with open(pair.aside(".bin"), "wb") as tokens, _open_index(pair.aside(".idx"), dtype, documents) as index:
        for shard in manifest.splits[split]:
            before, begun = index.documents, 0
            for batch in shard_batches(folder, shard):
                tokens.write(batch.astype(dtype).tobytes())
                stops = np.flatnonzero(batch == manifest.end_of_text) + 1
                if len(stops):
                    index.add(np.diff(stops, prepend=-begun))
                begun = len(batch) - int(stops[-1]) if len(stops) else begun + len(batch)
                yield len(batch)
            found = index.documents - before
            if begun or found != shard.documents:
                what = f"{found} ends of text and {begun} tokens after the last, not {shard.documents} documents"
                raise damaged(folder / shard.file, what)
        tokens.flush()
        os.fsync(tokens.fileno())


class _Index:
    """An index written in order of documents: its three tables grow side by side in one file."""

    def __init__(self, tables: tuple[BinaryIO, BinaryIO, BinaryIO], item_bytes: int) -> None:
        self.documents = 0
        self._tables, self._item_bytes, self._next_byte = tables, item_bytes, 0

    def add(self, lengths: NDArray[np.integer[Any]]) -> None:
        """Appends documents of these lengths in tokens."""
        stops = self._next_byte + np.cumsum(lengths, dtype=np.int64) * self._item_bytes
        starts = stops - lengths * self._item_bytes
        numbers = self.documents + 1 + np.arange(len(lengths))
        for table, values, kind in zip(self._tables, (lengths, starts, numbers), ("<i4", "<i8", "<i8"), strict=True):
            table.write(values.astype(kind).tobytes())
        self.documents += len(lengths)
        self._next_byte = int(stops[-1])


@contextlib.contextmanager
def _open_index(path: Path, dtype: np.dtype[Any], documents: int) -> Iterator[_Index]:
    """An index of so many documents; durable when the block ends."""
    code = _CODE_UINT16 if dtype.itemsize == 2 else _CODE_INT32
    path.write_bytes(_HEADER + struct.pack("<QBQQ", 1, code, documents, documents + 1))
    with open(path, "r+b") as lengths, open(path, "r+b") as pointers, open(path, "r+b") as numbers:
        lengths.seek(_PREAMBLE_BYTES)
        pointers.seek(_PREAMBLE_BYTES + 4 * documents)
        numbers.seek(_PREAMBLE_BYTES + 12 * documents)
        numbers.write(np.zeros(1, dtype="<i8").tobytes())
        yield _Index((lengths, pointers, numbers), dtype.itemsize)
        for table in (lengths, pointers, numbers):
            table.flush()
            os.fsync(table.fileno())
