"""What a build holds, for a person or a script: figures of its splits, where it came from, and a look at its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.build import open_tokenizer
from data_pipeline.manifest import SPLITS, Manifest, Shard
from data_pipeline.shards import TokenSplit
from data_pipeline.verification import open_manifest

_SEARCHED_TOKENS = 4096  # how far a sample looks for the beginning of a document
_SHOWN_TOKENS = 96


def describe_build(folder: Path, samples: int) -> dict[str, Any]:
    """Describes a build from its manifest, and decodes beginnings of documents.

    Args:
        folder: The build.
        samples: Documents to show of each split, at even distances.

    Returns:
        `build_dir`, `fingerprint`, `created_from`, `tokenizer`, `splits`, `sources` (by name, with `input`, `license`
        and figures of the training split; empty without named sources), `empty_documents`, `skipped` (each with
        `where` and `reason`), `ignored_endings`, `cleaning` (None without it) and `samples` (each with `split`,
        `position` and `text`).

    Raises:
        DataError: The folder is no build, or what a sample needs is damaged.
    """
    manifest = open_manifest(folder)
    return {
        "build_dir": str(folder),
        "version": manifest.version,
        "fingerprint": manifest.fingerprint,
        "created_from": manifest.created_from,
        "tokenizer": {
            "sha256": manifest.tokenizer_sha256,
            "size": manifest.tokenizer_size,
            "end_of_text": manifest.end_of_text,
        },
        "splits": {split: _figures(manifest.splits[split]) for split in SPLITS},
        "sources": _sources(manifest),
        "empty_documents": manifest.empty_documents,
        "skipped": [{"where": where, "reason": reason} for where, reason in manifest.skipped],
        "ignored_endings": manifest.ignored_endings,
        "cleaning": manifest.cleaning,
        "samples": [sample for split in SPLITS for sample in _samples(folder, split, samples)] if samples else [],
    }


def _sources(manifest: Manifest) -> dict[str, dict[str, Any]]:
    training = manifest.splits["train"]
    return {
        name: {**said, **_figures([shard for shard in training if shard.source == name])}
        for name, said in (manifest.sources or {}).items()
    }


def _figures(shards: Sequence[Shard]) -> dict[str, Any]:
    tokens = sum(shard.tokens for shard in shards)
    text_bytes = sum(shard.text_bytes for shard in shards)
    return {
        "shards": len(shards),
        "documents": sum(shard.documents for shard in shards),
        "tokens": tokens,
        "text_bytes": text_bytes,
        "file_bytes": sum(shard.file_bytes for shard in shards),
        "bytes_per_token": text_bytes / tokens if tokens else None,
    }


def _samples(folder: Path, split: str, number: int) -> Iterator[dict[str, Any]]:
    """Beginnings of documents at even distances in the stream; fewer where documents are few."""
    stream, tokenizer = TokenSplit(folder, split), open_tokenizer(folder)
    shown: set[int] = set()
    for place in range(number):
        start = _document_after(stream, place * stream.num_tokens // number, tokenizer.end_of_text)
        if start in shown or start >= stream.num_tokens:
            continue
        shown.add(start)
        ids = stream.tokens(start, min(start + _SHOWN_TOKENS, stream.num_tokens))
        ends = np.flatnonzero(ids == tokenizer.end_of_text)
        ids = ids[: ends[0]] if len(ends) else ids
        yield {"split": split, "position": start, "text": tokenizer.decode(ids.tolist())}


def _document_after(stream: TokenSplit, position: int, end_of_text: int) -> int:
    """Where the first document from a position begins; the position itself inside a very long document."""
    if position == 0:
        return 0
    stop = min(position + _SEARCHED_TOKENS, stream.num_tokens)
    ends = np.flatnonzero(stream.tokens(position - 1, stop) == end_of_text)
    return position + int(ends[0]) if len(ends) else position
