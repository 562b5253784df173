"""Where checkpoints lie and how one comes to exist: written beside its final place, then renamed.

    <root>/step-00000050/manifest.json               a checkpoint is a folder with a manifest
    <root>/step-00000050/part-00000-of-00002.safetensors
    <root>/.writing-step-00000100-4f2a/              not yet one; swept at the next save
    <root>/.replaced-step-00000100-77b0/             the one before under a name that is being given anew

A folder is renamed only after every part and the manifest are on disk, so that a kill at any moment leaves either the
whole checkpoint or none. Where a checkpoint of that step is there already, it steps aside first and counts as committed
until the new one has the name.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from moe_dist.checkpoint.manifest import MANIFEST, Manifest, manifest_bytes
from moe_dist.errors import CheckpointError

_COMMITTED = re.compile(r"^(?:step-(\d{8,18})|\.replaced-step-(\d{8,18})-[0-9a-f]{8})$")


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def part_name(number: int, parts: int) -> str:
    """The name of a part."""
    return f"part-{number:05d}-of-{parts:05d}.safetensors"


def committed(root: Path) -> list[Path]:
    """Checkpoints under a root, newest first."""
    if not root.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir(), reverse=True):  # a plain name comes before the same one replaced
        if _COMMITTED.match(path.name):
            found.setdefault(step_of(path), path)
    return [path for _, path in sorted(found.items(), reverse=True)]


def begin(root: Path, step: int, needed: int) -> Path:
    """Creates the folder that a checkpoint is written into, after sweeping what a killed save left.

    Args:
        root: Where checkpoints lie.
        step: Updates made.
        needed: Bytes that it will take.

    Raises:
        CheckpointError: There is less room.
    """
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    available = shutil.disk_usage(root).free
    if available < needed:
        fix = "make room; the checkpoints before are intact, and training goes on"
        raise CheckpointError(str(root), f"{available:,} bytes free", f"a checkpoint needs {needed:,} bytes", fix)
    folder = root / f".writing-{step_name(step)}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder


def sweep(root: Path) -> None:
    """Removes what a killed save left, and gives a checkpoint its name back that had stepped aside for it."""
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for aside in root.glob(".replaced-*"):
        name = root / aside.name.removeprefix(".replaced-").rpartition("-")[0]
        if name.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(name)


def commit(folder: Path, manifest: Manifest, allowed: Callable[[], None] = lambda: None) -> Path:
    """Writes the manifest, makes everything durable, and gives the folder its final name.

    `allowed` raises where this process may not publish any more; it is asked last, just before the name is given.
    """
    write_durably(folder / MANIFEST, manifest_bytes(manifest))
    sync_folder(folder)
    allowed()
    final = folder.parent / step_name(manifest.step)
    replaced = folder.parent / f".replaced-{final.name}-{uuid.uuid4().hex[:8]}"
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def prune(root: Path, published: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Removes what is older than the newest `keep` checkpoints up to the one just published.

    Later ones exist only where a damaged one was passed over; the run writes them anew when it gets there.

    Args:
        root: Where checkpoints lie.
        published: The newest that counts.
        keep: How many stay, with it.
        keep_every: Those of steps that are multiples of this stay too; 0 for none.

    Returns:
        What was removed.
    """
    older = [path for path in committed(root) if step_of(path) < step_of(published)]
    gone = [path for path in older[keep - 1 :] if not keep_every or step_of(path) % keep_every]
    for path in gone:
        remove(path)
    return gone


def remove(path: Path) -> None:
    """Removes a checkpoint; killed in between, what is left of it is no checkpoint."""
    going = path.parent / f".writing-pruned-{uuid.uuid4().hex[:8]}"
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    match = _COMMITTED.match(path.name)
    assert match, f"{path} is named as a checkpoint is"
    return int(match[1] or match[2])


def write_durably(file: Path, content: bytes) -> None:
    """Writes a small file to the disk."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        done = 0
        while done < len(content):
            done += os.write(handle, content[done:])
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
