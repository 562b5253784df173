"""Whether a build is what its manifest says: names, tokenizer, and every token of every shard.

A build may come from a stranger, so nothing in its manifest is believed: types are checked before they are used, and a
shard is a file of the folder itself. Reading executes nothing and writes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.account import problem_of_account
from data_pipeline.build import open_tokenizer
from data_pipeline.lengths import LengthFile, find_lengths
from data_pipeline.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_NAME, Manifest, Shard, read_manifest
from data_pipeline.shards import BATCH_TOKENS, file_sha256
from moe_dist.errors import DataError

_REBUILD = "fetch that file again, or remove the folder of this build and build again"
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.arrow")


def verify_build(folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Proves a build whole, reading every byte of it.

    Args:
        folder: The build.
        progress: Called with (bytes of shards done, bytes in all).

    Returns:
        What was proven: `build_dir`, `shards`, `documents`, `tokens` and `file_bytes`.

    Raises:
        DataError: The first thing that is not as the manifest says, with the file it concerns.
    """
    manifest = open_manifest(folder)
    _check_no_unlisted_shard(folder, manifest)
    _check_tokenizer(folder, manifest)
    shards = [shard for split in SPLITS for shard in manifest.splits[split]]
    total, done = sum(shard.file_bytes for shard in shards), 0
    for shard in shards:
        _check_shard(folder, shard, manifest)
        done += shard.file_bytes
        if progress is not None:
            progress(done, total)
    if manifest.lengths is not None:
        _check_lengths(folder, manifest)
    return {
        "build_dir": str(folder),
        "shards": len(shards),
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "file_bytes": total,
    }


def open_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a build whose maker is not trusted.

    Raises:
        DataError: It is missing or damaged, has values of a wrong type, or names a shard outside the folder.
    """
    try:
        manifest = read_manifest(folder)
        problem = _problem_of(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        rule = "the manifest has the fields and types of a build, and names files of its own folder"
        raise DataError(str(folder / MANIFEST_NAME), problem, rule, "use no build from this source; build it yourself")
    return manifest


def shard_batches(folder: Path, shard: Shard) -> Iterator[NDArray[np.integer[Any]]]:
    """Yields the tokens of a shard in batches of `BATCH_TOKENS`, after its size and hash have proven right.

    Raises:
        DataError: The shard is missing, damaged, or holds another number of tokens.
    """
    path = folder / shard.file
    try:
        _expect(path, path.stat().st_size, shard.file_bytes, "bytes")
        _expect(path, file_sha256(path), shard.sha256, "as sha256")
        with pa.OSFile(str(path)) as file:
            reader = pa.ipc.open_file(file)
            left = shard.tokens
            for number in range(reader.num_record_batches):
                batch = _decoded(path, reader.get_batch(number))
                _expect(path, len(batch), min(BATCH_TOKENS, left), f"tokens in batch {number}")
                left -= len(batch)
                yield batch
            _expect(path, shard.tokens - left, shard.tokens, "tokens")
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, getattr(error, "strerror", None) or error) from None


def damaged(path: Path, found: object) -> DataError:
    """The error for a file of a build that is not as its manifest says."""
    return DataError(str(path), found, "every file of a build is as its manifest says", _REBUILD)


def _problem_of(manifest: Manifest) -> str:
    """What is wrong with the fields of a manifest; empty where nothing is."""
    if set(manifest.splits) != set(SPLITS):
        return f"splits {sorted(map(str, manifest.splits))}, not {', '.join(SPLITS)}"
    if not _are_counts(manifest.tokenizer_size, manifest.end_of_text, manifest.empty_documents):
        return "a size or id that is no whole number"
    if not manifest.end_of_text < manifest.tokenizer_size:
        return f"end_of_text {manifest.end_of_text} of {manifest.tokenizer_size} tokens"
    if manifest.lengths is not None and not _are_tables(manifest.lengths):
        return "lengths is no table"
    if not _are_tables(manifest.created_from, manifest.ignored_endings):
        return "created_from or ignored_endings is no table"
    if not all(isinstance(text, str) for row in manifest.skipped for text in row):
        return "skipped has something else than text"
    if problem := problem_of_account(manifest.cleaning):
        return problem
    shards = [shard for split in SPLITS for shard in manifest.splits[split]]
    for shard in shards:
        if not isinstance(shard.file, str) or not _SHARD_NAME.fullmatch(shard.file):
            return f"a shard named {shard.file!r}"
        if not _are_counts(shard.tokens, shard.documents, shard.text_bytes, shard.file_bytes):
            return f"a count of {shard.file} is no whole number"
    repeated = [name for name, count in Counter(shard.file for shard in shards).items() if count > 1]
    return f"{repeated[0]} is listed twice" if repeated else _problem_of_sources(manifest, shards)


def _problem_of_sources(manifest: Manifest, shards: list[Shard]) -> str:
    sources = {"": {}} if manifest.sources is None else manifest.sources
    if not isinstance(sources, dict) or not _are_tables(*sources.values()):
        return "sources is no table of tables"
    if not all(value is None or isinstance(value, str) for source in sources.values() for value in source.values()):
        return "a source has something else than text"
    strange = [shard.file for shard in shards if not isinstance(shard.source, str) or shard.source not in sources]
    return f"{strange[0]} is of no source of the manifest" if strange else ""


def _are_counts(*values: object) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


def _are_tables(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def _check_no_unlisted_shard(folder: Path, manifest: Manifest) -> None:
    listed = {shard.file for split in SPLITS for shard in manifest.splits[split]}
    extra = sorted(path.name for path in folder.glob("*.arrow") if path.name not in listed)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        rule = "every shard in the folder is listed in the manifest"
        raise DataError(str(folder / extra[0]), f"not listed{more}", rule, "remove it, or build again")


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    path = folder / TOKENIZER_NAME
    try:
        _expect(path, file_sha256(path), manifest.tokenizer_sha256, "as sha256")
    except OSError as error:
        raise damaged(path, error.strerror) from None
    tokenizer = open_tokenizer(folder)
    _expect(path, tokenizer.size, manifest.tokenizer_size, "tokens")
    _expect(path, tokenizer.end_of_text, manifest.end_of_text, "as id of end-of-text")


def _check_shard(folder: Path, shard: Shard, manifest: Manifest) -> None:
    path = folder / shard.file
    tokens_hash = hashlib.sha256()
    ends, last = 0, manifest.end_of_text
    for batch in shard_batches(folder, shard):
        lowest, highest = int(batch.min()), int(batch.max())
        if lowest < 0 or highest >= manifest.tokenizer_size:
            raise damaged(path, f"ids from {lowest} to {highest}, of {manifest.tokenizer_size} tokens")
        tokens_hash.update(batch.astype("<i4").tobytes())
        ends += int((batch == manifest.end_of_text).sum())
        last = int(batch[-1])
    _expect(path, tokens_hash.hexdigest(), shard.tokens_sha256, "as sha256 of the tokens")
    _expect(path, ends, shard.documents, "ends of text, one for each document")
    _expect(path, last, manifest.end_of_text, "as the last token, which ends a text")


def _check_lengths(folder: Path, manifest: Manifest) -> None:
    """The lengths of documents are those of the tokens, which have proven right."""
    for split in SPLITS:
        lengths = LengthFile(folder, split, manifest)
        for number, shard in enumerate(manifest.splits[split]):
            found = find_lengths(shard_batches(folder, shard), manifest.end_of_text)
            if not np.array_equal(found, lengths.of_shard(number)):
                raise damaged(lengths.path, f"other lengths than those of the documents in {shard.file}")


def _decoded(path: Path, batch: pa.RecordBatch) -> NDArray[np.integer[Any]]:
    """The tokens of one batch, copied out of the file's buffer."""
    column = batch.column(0)
    if batch.schema.names != ["tokens"] or column.type not in (pa.uint16(), pa.int32()) or column.null_count:
        raise damaged(path, f"columns {batch.schema.names} of {column.type}, not tokens of uint16 or int32")
    return np.asarray(column.to_numpy()).copy()


def _expect(path: Path, found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise damaged(path, f"{found} {what}, not {wanted}")
