"""Cutting a checkpoint into another number of files, in one process and one tensor at a time.

A run never needs this: every layout reads every number of parts. It serves those who copy, store or mend checkpoints.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.checkpoint import store
from moe_dist.checkpoint.header import plan_header
from moe_dist.checkpoint.manifest import DTYPES, FORMAT, Manifest, checked, read_manifest
from moe_dist.checkpoint.read import Reader
from moe_dist.checkpoint.write import stream_file
from moe_dist.errors import CheckpointError


def reshard(path: Path, root: Path, parts: int) -> Path:
    """Writes a checkpoint anew, under the same step, in `parts` files of like size; every byte read is proven.

    Args:
        path: The checkpoint.
        root: The folder to put it into.
        parts: Files.

    Raises:
        CheckpointError: It is damaged, there is no room, or `root` has a checkpoint of that step.
    """
    manifest = read_manifest(path)
    final = root / store.step_name(manifest.step)
    if final.exists():
        raise CheckpointError(str(final), "exists", "a checkpoint is never written over", "another folder")
    root.mkdir(parents=True, exist_ok=True)
    available = shutil.disk_usage(root).free
    if available < manifest.num_bytes:
        rule = f"the checkpoint needs {manifest.num_bytes:,} bytes"
        raise CheckpointError(str(root), f"{available:,} bytes free", rule, "make room, or another folder")
    save = uuid.uuid4().hex
    folder = root / f".writing-{final.name}-{save[:8]}"
    folder.mkdir()
    try:
        with Reader(path, manifest) as reader:
            written = [
                _write(reader, folder, names, save, (number, parts))
                for number, names in enumerate(share_out(manifest, parts))
            ]
        kept = manifest.model_dump(include={"step", "config", "data", "state"})
        layout = f"{manifest.layout}; cut anew into {parts}"
        told = {**kept, "format": FORMAT, "save": save, "layout": layout, "parts": written}
        return store.commit(folder, checked(told, str(folder)))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def share_out(manifest: Manifest, parts: int) -> list[list[str]]:
    """Names for every part: the largest tensors first, each to the part that is the smallest by then."""
    names: list[list[str]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for name, (_, entry) in sorted(manifest.tensors.items(), key=lambda item: (-item[1][1].num_bytes, item[0])):
        smallest = sizes.index(min(sizes))
        names[smallest].append(name)
        sizes[smallest] += entry.num_bytes
    return names


def _write(reader: Reader, folder: Path, names: list[str], save: str, place: tuple[int, int]) -> dict[str, object]:
    manifest = reader.manifest
    entries = {name: manifest.tensors[name][1] for name in names}
    shapes = {name: (torch.Size(entry.shape), DTYPES[entry.dtype]) for name, entry in entries.items()}
    header = plan_header(shapes, {"save": save, "step": str(manifest.step)})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in header.tensors:
            yield name, reader.tensor(name)

    return stream_file(folder / store.part_name(*place), header, tensors())
