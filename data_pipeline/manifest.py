"""manifest.json of a build: which shards make up which split. Written last, so that a folder without it is no build."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.errors import DataError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT_VERSION = 1
CLEANED_VERSION = 2  # of a build whose text was cleaned: its manifest has `cleaning`
LENGTHS_VERSION = 3  # of a build with the lengths of its documents, cleaned or not: its manifest has `lengths`
SOURCES_VERSION = 4  # of a build of named sources, of whichever kind: its manifest has `sources`, and so its shards
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Shard:
    """A row of the manifest.

    Attributes:
        file: Name in the build folder.
        tokens: Its tokens, an end-of-text after each document included.
        documents: Documents that end in it.
        text_bytes: UTF-8 bytes of their text.
        file_bytes: Size of the file.
        sha256: Hash of the file.
        tokens_sha256: Hash of the tokens as little-endian int32; the same however the file is compressed.
        source: Name of the source that its text is from; empty in a build without sources.
    """

    file: str
    tokens: int
    documents: int
    text_bytes: int
    file_bytes: int
    sha256: str
    tokens_sha256: str
    source: str = ""


@dataclass(frozen=True)
class Manifest:
    """A build.

    Attributes:
        version: Version of the format: `FORMAT_VERSION`, `CLEANED_VERSION` or `LENGTHS_VERSION`.
        fingerprint: Hash of the input's listing and of the configuration that matters; names the folder.
        created_from: Those configuration values.
        tokenizer_sha256: Hash of the build's tokenizer.json.
        tokenizer_size: One more than the highest token id.
        end_of_text: Id of the token after each document.
        splits: Shards of `train` and of `heldout`, in the order of the text.
        empty_documents: Documents without a character, left out.
        skipped: (id, reason) of files and records left out because they could not be read.
        ignored_endings: Files of the input folder that were not read, by ending.
        cleaning: What cleaning and de-duplication changed and removed, as `Tally.tree` gives it; None without them.
        lengths: Hash of the lengths of the documents of each split (`lengths.py`); None where they are not there.
        sources: Of each named source, in the order of the text, where it lies and under which licence; None without.
    """

    version: int
    fingerprint: str
    created_from: dict[str, Any]
    tokenizer_sha256: str
    tokenizer_size: int
    end_of_text: int
    splits: dict[str, tuple[Shard, ...]]
    empty_documents: int
    skipped: tuple[tuple[str, str], ...]
    ignored_endings: dict[str, int]
    cleaning: dict[str, Any] | None = None
    lengths: dict[str, str] | None = None
    sources: dict[str, dict[str, Any]] | None = None

    def num_tokens(self, split: str) -> int:
        """Tokens of a split."""
        return sum(shard.tokens for shard in self.splits[split])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, with a hash of itself, under a temporary name and renames it."""
    tree = dataclasses.asdict(manifest)
    if manifest.version < CLEANED_VERSION:
        del tree["cleaning"]
    if manifest.version < LENGTHS_VERSION:
        del tree["lengths"]
    if manifest.version < SOURCES_VERSION:
        del tree["sources"]
        for shard in (shard for shards in tree["splits"].values() for shard in shards):
            del shard["source"]
    tree["manifest_sha256"] = _self_hash(tree)
    temporary = folder / f".{MANIFEST_NAME}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(tree, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST_NAME)
    fsync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        DataError: It is missing, damaged, or of another version.
    """
    path = folder / MANIFEST_NAME
    fix = "remove the folder and build again"
    try:
        tree = json.loads(path.read_bytes())
        stored = tree.pop("manifest_sha256")
        version = tree["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(str(folder), "no manifest.json", "a build has a manifest", _nearest_build(folder)) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(str(path), error, "the manifest is whole", fix) from None
    if version not in range(FORMAT_VERSION, SOURCES_VERSION + 1):
        rule = f"this program reads versions {FORMAT_VERSION} to {SOURCES_VERSION}"
        raise DataError(str(path), f"version {version}", rule, fix)
    if stored != _self_hash(tree):
        raise DataError(str(path), "contents do not match manifest_sha256", "the manifest is unchanged", fix)
    tree["splits"] = {name: tuple(Shard(**row) for row in rows) for name, rows in tree["splits"].items()}
    tree["skipped"] = tuple((id_, reason) for id_, reason in tree["skipped"])
    return Manifest(**tree)


def _nearest_build(folder: Path) -> str:
    """What to do where there is no build: `data.dir` may have been named in place of what is in it."""
    inside = sorted(path.parent for path in folder.glob(f"[!.]*/{MANIFEST_NAME}"))
    return f"name a build: {', '.join(map(str, inside[:8]))}" if inside else "build the data again"


def fsync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _self_hash(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode("utf-8")).hexdigest()
