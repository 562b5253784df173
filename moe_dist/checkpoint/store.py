"""Where checkpoints lie and how one comes to exist: written beside its final place, then renamed.

    <root>/step-00000050/manifest.json               a checkpoint is a folder with a manifest
    <root>/step-00000050/part-00000-of-00002.safetensors
    <root>/.writing-step-00000100-4f2a/              not yet one; swept at the next save

A folder is renamed only after every part and the manifest are on disk, so that a kill at any moment leaves either the
whole checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from moe_dist.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_COMMITTED = re.compile(r"^step-(\d{8,})$")


def committed(root: Path) -> list[Path]:
    """Checkpoints under a root, newest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _COMMITTED.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def begin(root: Path, step: int) -> Path:
    """Creates the folder that a checkpoint is written into, after sweeping what a killed save left."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = root / f".writing-step-{step:08d}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder


def commit(folder: Path, step: int, manifest: dict[str, Any]) -> Path:
    """Writes the manifest, makes everything durable, and gives the folder its final name."""
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1, sort_keys=True)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    final = folder.parent / f"step-{step:08d}"
    replaced = folder.parent / f".writing-replaced-{uuid.uuid4().hex[:8]}"
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def prune(root: Path, published: Path, keep: int) -> None:
    """Removes what is older than the newest `keep` checkpoints up to the one just published.

    Later ones exist only where a damaged one was passed over; the run writes them anew when it gets there.
    """
    older = [path for path in committed(root) if path.name < published.name]
    for path in older[keep - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads and proves a manifest.

    Raises:
        CheckpointError: It is missing, not JSON, of another format, or not what was written.
    """
    where = str(path / MANIFEST)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(where, error, "a checkpoint has a readable manifest", "use an older checkpoint") from None
    if digest != _digest(manifest):
        raise CheckpointError(where, digest, "the manifest is what was written", "use an older checkpoint")
    if manifest.get("format") != FORMAT:
        fix = "use the version of moe_dist that wrote it"
        raise CheckpointError(where, manifest.get("format"), f"this version reads format {FORMAT}", fix)
    return manifest


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Proves a checkpoint: manifest, size and SHA-256 of every part. Returns the manifest.

    Args:
        path: The checkpoint.
        share: (i, n) proves only every n-th part from the i-th, for n ranks that share the work.

    Raises:
        CheckpointError: Naming the first file that is not what was written.
    """
    manifest = read_manifest(path)
    for part in manifest["parts"][share[0] :: share[1]]:
        file = path / part["file"]
        if not file.is_file():
            raise CheckpointError(str(file), "missing", "every part of the manifest exists", "use an older checkpoint")
        if file.stat().st_size != part["bytes"]:
            rule = f"the part has {part['bytes']} bytes"
            raise CheckpointError(str(file), f"{file.stat().st_size} bytes", rule, "use an older checkpoint")
        found = file_digest(file)
        if found != part["sha256"]:
            rule = f"the part's SHA-256 is {part['sha256'][:16]}..."
            raise CheckpointError(str(file), f"{found[:16]}...", rule, "the file is damaged: use an older checkpoint")
    return manifest


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
