"""The manifest: what a checkpoint holds, where it lies, and the hashes that prove every byte of it.

    {"format": 2, "step": 50, "save": "9f3c...", "config": {...}, "data": {...}, "state": {...}, "layout": "...",
     "parts": [{"file": "part-00000-of-00002.safetensors", "bytes": ..., "header_bytes": ..., "header_hash": "...",
                "tensors": {"model/embedding.weight": {"dtype": "F32", "shape": [...], "start": ..., "end": ...,
                                                       "hashes": ["one for every 4 MiB", ...]}, ...}}, ...],
     "xxh3_128": "of all bytes before this key"}

It is read as if a stranger had written it: no pickle, no name outside the folder, no number that is taken on trust.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_dist.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2
CHUNK_BYTES = 4 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OLDER = "use an older checkpoint"
_MOST_BYTES = 256 * 2**20
_TAIL = re.compile(rb', "xxh3_128": "([0-9a-f]{32})"\}\n\Z')

Count = Annotated[int, Field(ge=0, le=2**62)]
Hash = Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Entry(_Strict):
    """One tensor of a part.

    Attributes:
        dtype: In safetensors' spelling.
        shape: Of the whole tensor.
        start: First byte, counted from the beginning of the file.
        end: The byte after the last.
        hashes: XXH3-128 of every 4 MiB of it, the last shorter; none in format 1, whose parts are hashed as a whole.
    """

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[list[Count], Field(max_length=8)]
    start: Count
    end: Count
    hashes: list[Hash]

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


class Part(_Strict):
    """One safetensors file.

    Attributes:
        file: Its name inside the checkpoint's folder.
        bytes: Its size.
        header_bytes: Where the tensors begin.
        header_hash: XXH3-128 of what is before.
        tensors: By global name.
        sha256: Of the whole file, in format 1 alone.
    """

    file: Annotated[str, Field(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,100}\.safetensors\z")]
    bytes: Count
    header_bytes: Count
    header_hash: Hash
    tensors: dict[str, Entry]
    sha256: str | None = None

    @model_validator(mode="after")
    def _tensors_fill_the_file(self) -> Part:
        place = self.header_bytes
        for name, entry in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
            if entry.start != place or entry.num_bytes != size:
                found = f"bytes {entry.start} to {entry.end}, shape {entry.shape}, {entry.dtype}"
                raise ValueError(f"{name}: {found}: it has {size} bytes from {place} on, with no gap and no overlap")
            if self.sha256 is None and len(entry.hashes) != -(-size // CHUNK_BYTES):
                raise ValueError(f"{name}: {len(entry.hashes)} hashes for {size} bytes: one for each 4 MiB")
            place = entry.end
        if place != self.bytes:
            raise ValueError(f"the tensors end at byte {place} of {self.bytes}")
        return self


class Manifest(_Strict):
    """A proven manifest.

    Attributes:
        format: As it was read; older ones are given in the form of this one.
        step: Updates made.
        save: Which save it is of: every part names it too, so that one of another save is found out.
        config: The resolved config.
        data: State of the batches: cursor and fingerprint.
        state: What else a run goes on from: schedule, random numbers, tokenizer.
        layout: What wrote it, for people.
        parts: The files.
    """

    format: Literal[1, 2]
    step: Count
    save: Annotated[str, Field(max_length=64)]
    config: dict[str, Any]
    data: dict[str, Any]
    state: dict[str, Any]
    layout: Annotated[str, Field(max_length=1000)]
    parts: list[Part]

    @model_validator(mode="after")
    def _every_name_once(self) -> Manifest:
        if self.format != 1 and any(part.sha256 is not None for part in self.parts):
            raise ValueError("a SHA-256 of a whole part belongs to format 1")
        files, tensors = [part.file for part in self.parts], [name for part in self.parts for name in part.tensors]
        for what, names in (("part", files), ("tensor", tensors)):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"duplicate {what} {', '.join(twice[:3])}")
        return self

    @cached_property
    def tensors(self) -> dict[str, tuple[Part, Entry]]:
        """Every tensor by its global name."""
        return {name: (part, entry) for part in self.parts for name, entry in part.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        return sum(part.bytes for part in self.parts)


def hash_of(content: Any) -> str:
    """XXH3-128 of bytes, in hexadecimal. It finds damage; it is no signature."""
    return xxhash.xxh3_128_hexdigest(content)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The file's content, ending with the hash of all that is before it."""
    body = json.dumps(manifest.model_dump(exclude_none=True), sort_keys=True, allow_nan=False).encode()[:-1]
    return body + f', "xxh3_128": "{hash_of(body)}"}}\n'.encode()


def open_regular(file: Path) -> int:
    """A descriptor for reading a regular file; links, pipes and devices are refused.

    Raises:
        CheckpointError: It is missing or something else.
    """
    rule = "a checkpoint consists of regular files, which this user may read"
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(str(file), "missing", "every file of the manifest exists", OLDER) from None
    except OSError as error:
        raise CheckpointError(str(file), error.strerror, rule, OLDER) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(str(file), "no regular file", rule, OLDER)
    return handle


def read_manifest(path: Path) -> Manifest:
    """Reads and proves the manifest of a checkpoint, or of one in format 1.

    Raises:
        CheckpointError: It is missing, not what was written, of another format, or says what cannot be.
    """
    where = str(path / MANIFEST)
    with os.fdopen(open_regular(path / MANIFEST), "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise CheckpointError(where, "longer", f"a manifest has at most {_MOST_BYTES:,} bytes", OLDER)
    return proven_manifest(content, where, path)


def proven_manifest(content: bytes, where: str, path: Path | None = None) -> Manifest:
    """A manifest from the bytes of its file.

    Args:
        content: The bytes.
        where: The file's name, for messages.
        path: The checkpoint's folder, which one of format 1 needs.

    Raises:
        CheckpointError: They are not what was written, of another format, or say what cannot be.
    """
    tail = _TAIL.search(content)
    tree = parse_json(content, where)
    found = tree.get("format")
    if found == 1 and path is not None:
        from moe_dist.checkpoint.format_one import upgraded

        tree = upgraded(path, tree)
    elif found != FORMAT and tail is not None:
        fix = "use the version of moe_dist that wrote it"
        raise CheckpointError(where, f"format {found}", f"this version reads formats 1 and {FORMAT}", fix)
    elif tail is None or hash_of(memoryview(content)[: tail.start()]) != tail[1].decode():
        raise CheckpointError(where, "another hash", "the manifest is what was written", OLDER)
    else:
        del tree["xxh3_128"]
    return checked(tree, where)


def checked(tree: dict[str, Any], where: str) -> Manifest:
    """A manifest from a plain tree.

    Raises:
        CheckpointError: Something in it cannot be.
    """
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))[:200]
        rule = f"{place}: {first['msg']}"
        raise CheckpointError(where, repr(first["input"])[:200], rule, OLDER) from None


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """One JSON object, in which no key comes twice.

    Raises:
        CheckpointError: It is none.
    """
    try:
        tree = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(where, error, "one JSON object, each key once, in UTF-8", OLDER) from None
    if not isinstance(tree, dict):
        raise CheckpointError(where, type(tree).__name__, "one JSON object", OLDER)
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {twice[:100]!r}")
    return tree


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
