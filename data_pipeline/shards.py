"""The shard format, written and read.

A shard is an Arrow IPC file, compressed with zstd, with one column `tokens` in batches of `BATCH_TOKENS`: a reader
decodes a batch, not a shard, to get at a row. Ids are uint16 where the vocabulary fits, which halves memory and disk.
The shards of a split form one stream of tokens: each document is followed by end-of-text, and row i of length S is
tokens [i*S, i*S + S + 1) of the stream, so that every token but the first is a target once.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.manifest import SPLITS, Manifest, Shard, fsync_folder, read_manifest
from moe_dist.errors import DataError, ShardError

BATCH_TOKENS = 2**16
CACHE_BYTES = 64 * 2**20
_REBUILD = "remove the folder of this build and build again"


class ShardWriter:
    """Writes one shard under a temporary name; `close` makes it durable and gives it its name.

    Args:
        path: Where the shard will be.
        vocab_size: Decides the width of an id.
        scratch: Folder of the same disk for the temporary file; by default the shard's own.
        source: Where its text is from.
    """

    def __init__(self, path: Path, vocab_size: int, scratch: Path | None = None, source: str = "") -> None:
        self.path, self.source = path, source
        self.text_bytes = self.documents = self.tokens = 0
        self._dtype = np.uint16 if vocab_size <= 2**16 else np.int32
        self._schema = pa.schema([pa.field("tokens", pa.from_numpy_dtype(self._dtype), nullable=False)])
        self._temporary = (scratch or path.parent) / f".{path.name}.{uuid.uuid4().hex}"
        self._pending: list[NDArray[np.int32]] = []
        self._pending_tokens = 0
        self._tokens_hash = hashlib.sha256()
        self._sink = pa.OSFile(str(self._temporary), "wb")
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3), use_threads=False)
        self._writer = pa.ipc.new_file(self._sink, self._schema, options=options)

    def add(self, ids: NDArray[np.int32], text_bytes: int) -> None:
        """Appends one document, end-of-text included."""
        self._pending.append(ids)
        self._pending_tokens += len(ids)
        self.tokens += len(ids)
        self.documents += 1
        self.text_bytes += text_bytes
        if self._pending_tokens >= BATCH_TOKENS:
            self._write_batches(BATCH_TOKENS)

    def close(self) -> Shard:
        """Finishes the file and returns its row of the manifest."""
        self._write_batches(1)
        self._writer.close()
        self._sink.close()
        with open(self._temporary, "r+b") as file:
            os.fsync(file.fileno())
        file_bytes, sha256 = self._temporary.stat().st_size, file_sha256(self._temporary)
        os.replace(self._temporary, self.path)
        fsync_folder(self.path.parent)
        figures = (self.tokens, self.documents, self.text_bytes, file_bytes, sha256, self._tokens_hash.hexdigest())
        return Shard(self.path.name, *figures, self.source)

    def discard(self) -> None:
        """Removes what was written so far."""
        self._sink.close()
        self._temporary.unlink(missing_ok=True)

    def _write_batches(self, at_least: int) -> None:
        """Writes pending tokens as full batches, and the rest as a last one where `at_least` allows it."""
        tokens = np.concatenate(self._pending) if self._pending else np.zeros(0, dtype=np.int32)
        while len(tokens) >= at_least:
            batch, tokens = tokens[:BATCH_TOKENS], tokens[BATCH_TOKENS:]
            self._tokens_hash.update(batch.astype("<i4").tobytes())
            self._writer.write_batch(pa.record_batch([pa.array(batch.astype(self._dtype))], schema=self._schema))
        self._pending, self._pending_tokens = [tokens], len(tokens)


class TokenSplit:
    """One split of a build, open for reading. Not shared between threads.

    Args:
        folder: The build.
        name: `train` or `heldout`.
        cache_bytes: Decoded batches are kept up to this size.
        source: Only the text of this source; None takes all.
        defers: What is wrong with a shard is found when a token of it is asked for, not before, and is remembered.

    Attributes:
        shards: Those that are read, in the order of the text.
        places: Where each stands among all shards of the split.

    Raises:
        DataError: The build has no usable manifest.
        ShardError: A shard is missing or of another size.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        cache_bytes: int = CACHE_BYTES,
        source: str | None = None,
        defers: bool = False,
    ) -> None:
        if name not in SPLITS:
            raise DataError("split", name, f"a split is one of {', '.join(SPLITS)}", f"take {SPLITS[0]}")
        self.folder, self.name = Path(folder), name
        self.manifest: Manifest = read_manifest(self.folder)
        every = self.manifest.splits[name]
        self.places = [place for place, shard in enumerate(every) if source in (None, shard.source)]
        self.shards = [every[place] for place in self.places]
        self._ends = list(accumulate(shard.tokens for shard in self.shards))
        self._verified: set[int] = set()
        self._cache: OrderedDict[tuple[int, int], NDArray[np.integer]] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._defers = defers
        self._damage: dict[int, ShardError] = {}
        if not defers:
            for shard in self.shards:
                self._check_size(shard)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole stream."""
        return self._ends[-1] if self._ends else 0

    @property
    def content_sha256(self) -> str:
        """Identity of the tokens, whatever folder, time or compression they were written with."""
        return hashlib.sha256("".join(shard.tokens_sha256 for shard in self.shards).encode()).hexdigest()

    def num_rows(self, sequence_length: int) -> int:
        """Whole rows of S inputs and S targets."""
        return max(0, self.num_tokens - 1) // sequence_length

    def row(self, i: int, sequence_length: int) -> NDArray[np.int64]:
        """Row i: [S + 1] ids.

        Raises:
            ShardError: A shard is damaged.
            IndexError: There is no such row.
        """
        if not 0 <= i < self.num_rows(sequence_length):
            raise IndexError(f"row {i} of {self.num_rows(sequence_length)}")
        return self.tokens(i * sequence_length, i * sequence_length + sequence_length + 1)

    def all_rows(self, sequence_length: int, rows_per_batch: int = 256) -> Iterator[NDArray[np.int64]]:
        """Every row once, in order, in arrays [<= rows_per_batch, S + 1]."""
        for first in range(0, self.num_rows(sequence_length), rows_per_batch):
            last = min(first + rows_per_batch, self.num_rows(sequence_length))
            stream = self.tokens(first * sequence_length, last * sequence_length + 1)
            yield np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)[::sequence_length].copy()

    def verify(self) -> None:
        """Checks the hash of every shard now.

        Raises:
            ShardError: The first shard that is missing or damaged.
        """
        for shard in self.shards:
            self._verify_shard(shard)

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the stream, at least one.

        Raises:
            ShardError: A shard is damaged.
        """
        parts = []
        while start < stop:
            number = bisect_right(self._ends, start)
            shard_start = self._ends[number - 1] if number else 0
            batch_number, offset = divmod(start - shard_start, BATCH_TOKENS)
            batch = self._batch(number, batch_number)
            part = batch[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts).astype(np.int64)

    def _batch(self, number: int, batch_number: int) -> NDArray[np.integer]:
        key = (number, batch_number)
        if key not in self._cache:
            batch = self._read(number, batch_number)
            self._cache[key] = batch
            self._cached_bytes += batch.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        self._cache.move_to_end(key)
        return self._cache[key]

    def _read(self, number: int, batch_number: int) -> NDArray[np.integer]:
        """Reads one batch; of a shard that is known to be damaged, not even its bytes."""
        if number in self._damage:
            raise self._damage[number]
        try:
            return self._decode(number, batch_number)
        except ShardError as error:
            if self._defers:
                self._damage[number] = error
            raise

    def _decode(self, number: int, batch_number: int) -> NDArray[np.integer]:
        """Reads one batch, without a memory map: a file that shrinks must be an error, not a signal."""
        shard = self.shards[number]
        if number not in self._verified:
            self._verify_shard(shard)
            self._verified.add(number)
        try:
            with pa.OSFile(str(self.folder / shard.file)) as file:
                batch = pa.ipc.open_file(file).get_batch(batch_number).column(0).to_numpy().copy()
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(shard, error) from None
        wanted = min(BATCH_TOKENS, shard.tokens - batch_number * BATCH_TOKENS)
        if len(batch) != wanted:
            raise self._damaged(shard, f"{len(batch)} tokens in batch {batch_number}, not {wanted}")
        return batch

    def _verify_shard(self, shard: Shard) -> None:
        self._check_size(shard)
        try:
            found = file_sha256(self.folder / shard.file)
        except OSError as error:
            raise self._damaged(shard, error.strerror) from None
        if found != shard.sha256:
            raise self._damaged(shard, f"sha256 {found}, not {shard.sha256}")

    def _check_size(self, shard: Shard) -> None:
        if Path(shard.file).name != shard.file:
            raise self._damaged(shard, "a path, where a name in the folder of the build is wanted")
        try:
            size = (self.folder / shard.file).stat().st_size
        except OSError as error:
            raise self._damaged(shard, error.strerror) from None
        if size != shard.file_bytes:
            raise self._damaged(shard, f"{size} bytes, not {shard.file_bytes}")

    def _damaged(self, shard: Shard, found: object) -> ShardError:
        fix = f"{_REBUILD}, or train without it: data.damaged_shards=quarantine" if self.name == "train" else _REBUILD
        return ShardError(str(self.folder / shard.file), found, "a shard is as its manifest says", fix)


def file_sha256(path: Path) -> str:
    """Hash of a file's contents, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
