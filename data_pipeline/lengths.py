"""How long the documents of a build are: what a packing needs to know, without reading a token.

`lengths-<split>.u32` holds one little-endian uint32 for every document of a split, in the order of its shards: tokens,
the end-of-text included. The manifest holds the hash of the file. Which document is in which shard follows from the
number of documents of each shard. Rows of any length can be planned from it, so that a build fits every one.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.manifest import Manifest, Shard, fsync_folder
from moe_dist.errors import DataError

_ITEM_BYTES = 4
_REBUILD = "remove the folder of this build and build again"


def lengths_name(split: str) -> str:
    """Name of the file in the folder of a build."""
    return f"lengths-{split}.u32"


def write_lengths(
    folder: Path, splits: Mapping[str, Sequence[Shard]], end_of_text: int, scratch: Path
) -> dict[str, str]:
    """Writes the lengths of the documents of all splits, each file by one rename; returns the hash of each.

    Args:
        folder: Where the shards are.
        splits: The shards of each split.
        end_of_text: Id that ends a document.
        scratch: Where files may lie until they are whole, on the same disk.

    Raises:
        OSError: A shard cannot be read, or a file not be written.
    """
    hashes = {}
    for split, shards in splits.items():
        digest = hashlib.sha256()
        own = scratch / uuid.uuid4().hex
        with open(own, "wb") as file:
            for shard in shards:
                data = find_lengths(_batches(folder / shard.file), end_of_text).astype("<u4").tobytes()
                assert len(data) == _ITEM_BYTES * shard.documents, f"{shard.file} holds a document without an end"
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(own, folder / lengths_name(split))
        hashes[split] = digest.hexdigest()
    fsync_folder(folder)
    return hashes


def find_lengths(batches: Iterable[NDArray[np.integer[Any]]], end_of_text: int) -> NDArray[np.int64]:
    """Lengths of the documents of a shard, end-of-text included, from its tokens; what has no end is left out."""
    ends, read = [np.zeros(1, dtype=np.int64)], 0
    for batch in batches:
        ends.append(np.flatnonzero(batch == end_of_text) + read + 1)
        read += len(batch)
    stops = np.concatenate(ends)
    return stops[1:] - stops[:-1]


class LengthFile:
    """The lengths of a split, open for reading a shard's part at a time.

    Args:
        folder: The build.
        split: Its name.
        manifest: Of the build.

    Raises:
        DataError: There are no lengths, or the file is not what the manifest says.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.path, self.shards = folder / lengths_name(split), manifest.splits[split]
        self._firsts = np.cumsum([0, *(shard.documents for shard in self.shards)])
        if manifest.lengths is None:
            found, rule = "no lengths of documents", "rows are packed by the lengths of documents, which a build has"
            raise DataError(str(folder), found, rule, "build with data.packing=best_fit")
        try:
            with open(self.path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._damaged(error.strerror) from None
        if found != manifest.lengths.get(split):
            raise self._damaged(f"sha256 {found}, not {manifest.lengths.get(split)}")

    def of_shard(self, number: int) -> NDArray[np.int64]:
        """Lengths of the documents of a shard, by its place among all of the split.

        Raises:
            DataError: They do not make up the shard.
        """
        shard, first = self.shards[number], int(self._firsts[number])
        try:
            lengths = np.fromfile(self.path, "<u4", shard.documents, offset=_ITEM_BYTES * first).astype(np.int64)
        except OSError as error:
            raise self._damaged(error.strerror) from None
        if len(lengths) != shard.documents or int(lengths.sum()) != shard.tokens or not lengths.all():
            what = f"{len(lengths)} documents of {int(lengths.sum())} tokens in {shard.file}"
            raise self._damaged(f"{what}, not {shard.documents} of {shard.tokens}")
        return lengths

    def _damaged(self, found: object) -> DataError:
        return DataError(str(self.path), found, "the lengths of documents are as the manifest says", _REBUILD)


def _batches(path: Path) -> Iterator[NDArray[np.integer[Any]]]:
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number).column(0).to_numpy()
