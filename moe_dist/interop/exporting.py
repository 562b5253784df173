"""From a checkpoint of any layout to a hub directory: tensor by tensor, every byte that is read proven."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.header import Header, plan_header
from moe_dist.checkpoint.load import check_complete
from moe_dist.checkpoint.manifest import Manifest, hash_of, manifest_bytes
from moe_dist.checkpoint.read import Reader
from moe_dist.checkpoint.store import sync_folder, write_durably
from moe_dist.config import ModelConfig
from moe_dist.errors import ExchangeError
from moe_dist.interop import work
from moe_dist.interop.families import FAMILIES, Family, write_fields
from moe_dist.interop.importing import our_tensors
from moe_dist.interop.names import Source, source_of
from moe_dist.interop.shards import INDEX, SINGLE, write_shard

SHARD_BYTES = 5 * 10**9
HUB_TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Outgoing:
    """One tensor of theirs.

    Attributes:
        name: Theirs.
        dtype: In the file.
        shape: In the file.
        pieces: (our tensor, which of what it is made into) of each row, or of the one whole.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    pieces: tuple[tuple[str, int], ...]

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Asked:
    """How a checkpoint is handed out.

    Attributes:
        family: One of the families; None takes the first that has such models.
        dtype: Of the weights in the files, by its name in config.json.
        shard_bytes: Most of a file, unless one tensor alone has more.
        kept: Fields of config.json that do not say what the model is.
        beside: Other files of the directory, by name: tokenizer, chat template, generation config.
    """

    family: Family | None
    dtype: str
    shard_bytes: int
    kept: Mapping[str, Any]
    beside: Mapping[str, bytes]


def choose_family(model: ModelConfig, asked: Family | None) -> tuple[Family, dict[str, Any]]:
    """The family that is asked for or the first that has such models, with its fields of config.json.

    Raises:
        ExchangeError: It has no such models, or none has.
    """
    if asked is not None:
        return asked, write_fields(asked, model)
    why = []
    for family in FAMILIES:
        try:
            return family, write_fields(family, model)
        except ExchangeError as error:
            why.append(f"{family.model_type}: {error.where}={error.value}")
    rule = "some family has such models"
    raise ExchangeError("model", "; ".join(why), rule, "train a model that one of them has (docs/interop.md)")


def export(path: Path, manifest: Manifest, out: Path, asked: Asked) -> tuple[Family, int, int]:
    """Writes the directory; killed, the same call goes on from the files that are done.

    Args:
        path: A checkpoint.
        manifest: Its proven manifest.
        out: The directory, which must not exist.
        asked: How.

    Returns:
        The family, how many files hold the weights, and how many of them were there already.

    Raises:
        ExchangeError: No family has such models, or `out` exists.
        CheckpointError: The checkpoint is damaged.
    """
    if out.exists():
        raise ExchangeError(str(out), "exists", "a directory is never written over", "another directory")
    config = check_complete(path, manifest)
    family, fields = choose_family(config.model, asked.family)
    sources = {name: source_of(name, family.table, family.model_type) for name in our_tensors(config.model)}
    shards = _in_shards(_outgoing(config.model, sources, HUB_TYPES[asked.dtype]), asked.shard_bytes)
    total = sum(tensor.num_bytes for tensors in shards for tensor in tensors)
    plan = [hash_of(manifest_bytes(manifest)), family.model_type, asked.dtype, asked.shard_bytes]
    with work.begin(out.parent / f".exporting-{out.name}", plan, total) as doing, Reader(path, manifest) as reader:
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(shards):
            file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            doing.file(file, lambda new, tensors=tensors: _write(new, reader, tensors, sources))  # type: ignore[misc]
            weight_map |= {tensor.name: file for tensor in tensors}
        beside = dict(asked.beside)
        beside["config.json"] = _json(_merged(asked, fields))
        if len(shards) > 1:
            beside[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, content in beside.items():
            write_durably(doing.folder / name, content)
        sync_folder(doing.folder)
        doing.folder.rename(out)
        work.Work(out).tidy()
        sync_folder(out.parent)
    return family, len(shards), doing.kept


def _merged(asked: Asked, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that came with the model, those of the mathematics as they are now."""
    kept = {name: value for name, value in asked.kept.items() if name not in ("dtype", "torch_dtype")}
    return {**kept, **fields, "torch_dtype": asked.dtype}


def _outgoing(model: ModelConfig, sources: Mapping[str, Source], dtype: torch.dtype) -> list[Outgoing]:
    """Every tensor of theirs in the order of the model; those in which experts are stacked with all their rows."""
    found: dict[str, Outgoing] = {}
    for name, tensor in our_tensors(model).items():
        kind = dtype if tensor.dtype is None else torch.promote_types(tensor.dtype, dtype)
        parts = sources[name].form.theirs(torch.empty(tensor.shape, device="meta"))
        for number, (key, part) in enumerate(zip(sources[name].keys, parts, strict=True)):
            before = found[key.name].pieces if key.name in found else ()
            pieces = (*before, (name, number))
            assert key.row in (None, len(before)), f"{key.name}: row {key.row} after {len(before)}"
            shape = part.shape if key.row is None else torch.Size([len(pieces), *part.shape])
            found[key.name] = Outgoing(key.name, kind, shape, pieces)
    return list(found.values())


def _in_shards(tensors: list[Outgoing], most: int) -> list[list[Outgoing]]:
    shards: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write(file: Path, reader: Reader, tensors: list[Outgoing], sources: Mapping[str, Source]) -> int:
    by_name = {tensor.name: tensor for tensor in tensors}
    header = plan_header({name: (tensor.shape, tensor.dtype) for name, tensor in by_name.items()}, {"format": "pt"})
    write_shard(file, header, _made(reader, header, by_name, sources))
    return file.stat().st_size


def _made(
    reader: Reader, header: Header, tensors: Mapping[str, Outgoing], sources: Mapping[str, Source]
) -> Iterator[Tensor]:
    """What a file holds, piece by piece; of what neighbours are made of the same tensor, it is read once."""
    name, value = "", torch.empty(0)
    for theirs in header.tensors:
        for ours, number in tensors[theirs].pieces:
            if ours != name:
                name, value = ours, reader.tensor(f"model/{ours}")
            yield sources[ours].form.theirs(value)[number].to(tensors[theirs].dtype)


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()
