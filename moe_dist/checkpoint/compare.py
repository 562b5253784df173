"""What differs between two checkpoints, tensor by tensor; never more than one tensor of each is in memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.manifest import Entry, Manifest, read_manifest
from moe_dist.checkpoint.read import Reader

_AT_ONCE = 2**20  # numbers compared in fp64 at a time


@dataclass(frozen=True)
class Difference:
    """A tensor that both have and that differs.

    Attributes:
        name: Global name with its kind, such as `exp_avg/blocks.0.feed_forward.experts.down#5`.
        expert: Global id of the expert it belongs to; None for a dense one.
        numbers: How many of its numbers differ.
        of: How many it has.
        largest: Largest absolute difference; infinite where a NaN or an infinity stands against something else.
        largest_relative: Largest difference over the larger of the two numbers.
    """

    name: str
    expert: int | None
    numbers: int
    of: int
    largest: float
    largest_relative: float


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Compares tensors by their hashes where both are hashed alike, else by their numbers, and the configs by key.

    Raises:
        CheckpointError: One of them cannot be read, or a tensor that has to be read is damaged.
    """
    first, second = read_manifest(a), read_manifest(b)
    common = [name for name in first.tensors if name in second.tensors]
    different: list[Difference] = []
    shapes: list[dict[str, Any]] = []
    with Reader(a, first) as read_a, Reader(b, second) as read_b:
        for name in common:
            x, y = first.tensors[name][1], second.tensors[name][1]
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                shapes.append({"name": name, "a": f"{x.shape} {x.dtype}", "b": f"{y.shape} {y.dtype}"})
            elif not _same_hashes(x, y):
                found = differ(name, read_a.tensor(name), read_b.tensor(name))
                different += [found] if found else []
    only = {
        f"only_in_{letter}": sorted(mine.tensors.keys() - other.tensors.keys())
        for letter, mine, other in (("a", first, second), ("b", second, first))
    }
    config = differing_keys(first.config, second.config)
    return {
        "equal": not (different or shapes or any(only.values())),
        "steps": [first.step, second.step],
        "tensors": len(common),
        "equal_tensors": len(common) - len(different) - len(shapes),
        "different": [asdict(found) for found in sorted(different, key=lambda d: -d.largest_relative)],
        "shapes": shapes,
        **only,
        "config": config,
    }


def differ(name: str, a: Tensor, b: Tensor) -> Difference | None:
    """How two tensors of one shape differ; None where they are equal, NaN being equal to NaN."""
    numbers, largest, relative = 0, 0.0, 0.0
    for x, y in zip(a.reshape(-1).split(_AT_ONCE), b.reshape(-1).split(_AT_ONCE), strict=True):
        x, y = x.double(), y.double()
        unequal = (x != y) & ~(x.isnan() & y.isnan())
        if not bool(unequal.any()):
            continue
        x, y = x[unequal], y[unequal]
        gap = (x - y).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        share = (gap / torch.maximum(x.abs(), y.abs())).nan_to_num(nan=torch.inf, posinf=torch.inf)
        numbers += len(x)
        largest, relative = max(largest, float(gap.max())), max(relative, float(share.max()))
    if not numbers:
        return None
    expert = name.rpartition("#")[2] if "#" in name else None
    return Difference(name, None if expert is None else int(expert), numbers, a.numel(), largest, relative)


def differing_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Keys of two plain trees whose values differ, with both."""
    if isinstance(a, dict) and isinstance(b, dict):
        inside = [differing_keys(a.get(key), b.get(key), f"{prefix}.{key}") for key in sorted(a.keys() | b.keys())]
        return [found for part in inside for found in part]
    return [] if a == b else [f"{prefix.removeprefix('.')} ({a} -> {b})"]


def _same_hashes(a: Entry, b: Entry) -> bool:
    return bool(a.hashes) and a.hashes == b.hashes


def summary_of(manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint holds, as plain values."""
    kinds: dict[str, int] = {}
    experts: dict[str, set[int]] = {}
    for name in manifest.tensors:
        kind, _, rest = name.partition("/")
        kinds[kind] = kinds.get(kind, 0) + 1
        if kind == "model" and "#" in rest:
            stack, _, expert = rest.rpartition("#")
            experts.setdefault(stack, set()).add(int(expert))
    return {
        "format": manifest.format,
        "step": manifest.step,
        "save": manifest.save,
        "layout": manifest.layout,
        "bytes": manifest.num_bytes,
        "tensors": kinds,
        "experts": {stack: len(ids) for stack, ids in experts.items()},
        "parts": [{"file": p.file, "bytes": p.bytes, "tensors": len(p.tensors)} for p in manifest.parts],
        "data": manifest.data,
        "state": manifest.state,
        "config": manifest.config,
    }
