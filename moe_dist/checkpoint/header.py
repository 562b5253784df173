"""The header of a safetensors file: made from a plan, and read as if a stranger had written it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.manifest import DTYPE_NAMES, OLDER, parse_json
from moe_dist.checkpoint.opened import Opened, read_all
from moe_dist.errors import CheckpointError

_MOST_BYTES = 100_000_000  # as safetensors itself allows


@dataclass(frozen=True)
class Header:
    """A header.

    Attributes:
        content: All bytes before the first tensor.
        tensors: dtype, shape, start and end (from the file's beginning) by name.
        save: Which save wrote it; empty where it does not say.
    """

    content: bytes
    tensors: dict[str, dict[str, Any]]
    save: str


def plan_header(tensors: dict[str, tuple[torch.Size, torch.dtype]], told: dict[str, str]) -> Header:
    """Lays tensors out one after the other, wide types first, so that each begins at a multiple of its width.

    Those of one width stay in their order: in which they are copied, and in which a rank of the same layout reads them.

    Args:
        tensors: Shape and type by name.
        told: What else the file says of itself: `save`, and `step`.
    """
    order = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    tree: dict[str, Any] = {"__metadata__": told}
    places: dict[str, dict[str, Any]] = {}
    end = 0
    for name in order:
        shape, dtype = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        places[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "start": start, "end": end}
        tree[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text
    return Header(content, _from_beginning(places, len(content)), told.get("save", ""))


def read_header(part: Opened, file: Path) -> Header:
    """The header of an open part.

    Raises:
        CheckpointError: Its length, its JSON or a tensor in it cannot be.
    """
    size = part.size
    length = int.from_bytes(read_all(part, 0, 8), "little")
    if size < 8 or length > min(_MOST_BYTES, size - 8):
        rule = f"a header fits into the file of {size:,} bytes and has at most {_MOST_BYTES:,}"
        raise CheckpointError(str(file), f"a header of {length:,} bytes", rule, OLDER)
    content = read_all(part, 0, 8 + length)
    tree = parse_json(content[8:], f"{file}: header")
    told = tree.pop("__metadata__", {})
    save = told.get("save", "") if isinstance(told, dict) else ""
    places: dict[str, dict[str, Any]] = {}
    for name, entry in tree.items():
        try:
            start, end = entry["data_offsets"]
            places[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "start": start, "end": end}
            whole = all(type(number) is int and number >= 0 for number in (start, end, *entry["shape"]))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            rule = "a tensor has a dtype, a shape and two offsets"
            raise CheckpointError(f"{file}: header: {name[:200]}", repr(entry)[:200], rule, OLDER)
    return Header(content, _from_beginning(places, len(content)), str(save))


def _from_beginning(places: dict[str, dict[str, Any]], offset: int) -> dict[str, dict[str, Any]]:
    return {
        name: {**place, "start": place["start"] + offset, "end": place["end"] + offset}
        for name, place in places.items()
    }
