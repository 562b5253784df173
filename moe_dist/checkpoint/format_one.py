"""Format 1, which wrote one SHA-256 a part and no places: read, never written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.header import read_header
from moe_dist.checkpoint.manifest import MANIFEST, OLDER, hash_of
from moe_dist.checkpoint.opened import open_file
from moe_dist.errors import CheckpointError


def upgraded(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a manifest of format 1 in the form of format 2, with places from the parts' own headers.

    Raises:
        CheckpointError: The manifest is not what was written, or a part is missing or has no such header.
    """
    where = str(path / MANIFEST)
    rest = {key: value for key, value in tree.items() if key != "sha256"}
    if tree.get("sha256") != hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest():
        raise CheckpointError(where, "another hash", "the manifest is what was written", OLDER)
    try:
        parts = [_part(path, part) for part in rest["parts"]]
        kept = {key: rest[key] for key in ("format", "step", "config", "data", "layout")}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(where, f"no {error}", "what format 1 has", OLDER) from None
    return {**kept, "save": "", "state": {}, "parts": parts}


def _part(path: Path, part: dict[str, Any]) -> dict[str, Any]:
    name = part["file"]
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(str(path / MANIFEST), name, "a part lies in the checkpoint's folder", OLDER)
    opened = open_file(path / name)
    try:
        header = read_header(opened, path / name)
    finally:
        opened.close()
    if set(header.tensors) != set(part["tensors"]):
        raise CheckpointError(str(path / name), "other tensors", "the part holds what the manifest says", OLDER)
    tensors = {key: {**entry, "hashes": []} for key, entry in header.tensors.items()}
    start = {"header_bytes": len(header.content), "header_hash": hash_of(header.content)}
    return {"file": name, "bytes": part["bytes"], **start, "tensors": tensors, "sha256": part["sha256"]}
