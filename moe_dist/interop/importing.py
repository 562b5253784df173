"""From named weights of another system to a checkpoint: tensor by tensor, proven whole before anything is written.

The checkpoint has weights alone. A run that begins with it begins with zero moments, at step 0 and at its first batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_dist.checkpoint import store
from moe_dist.checkpoint.header import plan_header
from moe_dist.checkpoint.manifest import FORMAT, checked, hash_of
from moe_dist.checkpoint.write import stream_file
from moe_dist.config import Config, ModelConfig
from moe_dist.errors import ExchangeError
from moe_dist.interop import work
from moe_dist.interop.names import Key, Source, Table, source_of
from moe_dist.model.naming import global_buffers, global_tensors
from moe_dist.model.transformer import Transformer

PART_BYTES = 4 * 2**30
# Tables that follow from config.json, and the output of tied embeddings, which must be the embedding.
_FOLLOWS = re.compile(r"\.rotary_emb\.inv_freq\Z")
_FIX = "weights of the config.json beside them; docs/interop.md lists what is carried"


class Weights(Protocol):
    """Named tensors of another system.

    Attributes:
        seen: What tells these weights from others.
    """

    seen: Any

    def names(self) -> Iterable[str]: ...

    def shape(self, key: Key) -> tuple[int, ...]: ...

    def rows(self, name: str) -> int:
        """Rows of a tensor in which experts are stacked."""
        ...

    def read(self, key: Key) -> Tensor: ...


@dataclass(frozen=True)
class OurTensor:
    """Shape of one of our tensors, and its type where that does not follow the config (a selection bias)."""

    shape: torch.Size
    dtype: torch.dtype | None = None


def our_tensors(config: ModelConfig) -> dict[str, OurTensor]:
    """Every tensor of a model by its global name, in order; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    found = {p.name: OurTensor(p.of(model.get_parameter(p.parameter)).shape) for p in global_tensors(model)}
    return found | {name: OurTensor(b.shape, b.dtype) for name, b in global_buffers(model).items()}


def match(
    weights: Weights, config: ModelConfig, table: Table, family: str, dropped: Sequence[str] = ()
) -> dict[str, Source]:
    """What each of our tensors is made of, after comparing every name and shape.

    Args:
        weights: To be read.
        config: The model.
        table: Our tensors by theirs.
        family: Its name, for errors.
        dropped: Patterns of names that are left out knowingly, as `model.layers.61.*`.

    Raises:
        ExchangeError: A tensor is missing, has another shape, or is left over.
    """
    names, used = set(weights.names()), set()
    _check_size(config, len(names))
    sources: dict[str, Source] = {}
    for name, tensor in our_tensors(config).items():
        source = sources[name] = source_of(name, table, family)
        expected = source.form.theirs(torch.empty(tensor.shape, device="meta"))
        for key, part in zip(source.keys, expected, strict=True):
            if key.name not in names:
                raise ExchangeError(key.name, "missing", f"it is what {name} is made of", _FIX)
            rows = None if key.row is None else config.moe.num_experts
            found = [*([] if rows is None else [weights.rows(key.name)]), *weights.shape(key)]
            wanted = [*([] if rows is None else [rows]), *part.shape]
            if found != wanted:
                raise ExchangeError(key.name, f"shape {found}", f"config.json makes it {wanted}", _FIX)
            used.add(key.name)
    left = {name for name in names - used if not any(fnmatchcase(name, pattern) for pattern in dropped)}
    _check_left_over(weights, left, config, sources)
    return sources


def _check_size(config: ModelConfig, tensors: int) -> None:
    """That a model is not too large to be listed, before it is.

    Raises:
        ExchangeError: Its config has sizes that cannot be.
    """
    if config.num_layers > tensors:
        rule = f"{tensors:,} tensors: a model has at least as many tensors as it has blocks"
        raise ExchangeError("model.num_layers", config.num_layers, rule, _FIX)
    if config.num_layers * config.moe.num_experts > 10**6:
        rule = f"a model of {config.num_layers} blocks has at most a million experts in all"
        raise ExchangeError("model.moe.num_experts", config.moe.num_experts, rule, _FIX)


def _check_left_over(weights: Weights, left: set[str], config: ModelConfig, sources: Mapping[str, Source]) -> None:
    """That what is not used follows from what is.

    Raises:
        ExchangeError: Something would be lost.
    """
    for name in sorted(left):
        if _FOLLOWS.search(name):
            continue
        tied = config.tie_embeddings and name in ("lm_head.weight", "output.weight")
        embedding = sources["embedding.weight"].keys[0]
        if not tied or not torch.equal(weights.read(Key(name)), weights.read(embedding)):
            rule = "another tensor than the embedding it is tied to" if tied else "no tensor of this model"
            fix = f"--drop {name[:200]!r} where it may be lost (a pattern does for many)"
            raise ExchangeError(name[:200], rule, "nothing is left out: every tensor has its place", fix)


def write_checkpoint(
    root: Path, config: Config, weights: Weights, sources: Mapping[str, Source], origin: str, parts: int | None = None
) -> tuple[Path, int]:
    """Writes the checkpoint of step 0; killed, the same call goes on from the parts that are done.

    Args:
        root: The checkpoints of the new run.
        config: Of the model; its precision says in which type weights are kept.
        weights: To be read.
        sources: From `match`.
        origin: What wrote it, for people.
        parts: Files; by default one for each 4 GiB.

    Returns:
        The checkpoint, and how many of its parts were there already.

    Raises:
        ExchangeError: There are checkpoints already, or a number would be rounded.
    """
    if store.committed(root):
        rule = "weights are imported into a run that has not begun"
        raise ExchangeError(str(root), "has checkpoints", rule, "another run directory")
    tensors = {name: (t.shape, t.dtype or weight_type(config)) for name, t in our_tensors(config.model).items()}
    total = sum(shape.numel() * dtype.itemsize for shape, dtype in tensors.values())
    groups = _share_out(tensors, total, parts or -(-total // PART_BYTES))
    told = config.model_dump(mode="json")
    plan = {"seen": weights.seen, "config": told, "parts": len(groups)}
    save = hash_of(repr(plan).encode())
    with work.begin(root / f".importing-{store.step_name(0)}", plan, total) as doing:
        entries = []
        for number, names in enumerate(groups):
            shapes = {f"model/{name}": tensors[name] for name in names}
            header = plan_header(shapes, {"save": save, "step": "0"})
            final = store.part_name(number, len(groups))

            def make(file: Path) -> dict[str, Any]:
                made = _made(header.tensors, weights, sources, tensors)  # noqa: B023 - called at once
                return {**stream_file(file, header, made), "file": final}  # noqa: B023

            entries.append(doing.file(final, make))
        manifest = {"format": FORMAT, "step": 0, "save": save, "config": told, "data": {}, "state": {}}
        layout = f"imported from {origin}"[:1000]
        path = store.commit(doing.folder, checked({**manifest, "layout": layout, "parts": entries}, str(root)))
        work.Work(path).tidy()
    return path, doing.kept


def weight_type(config: Config) -> torch.dtype:
    """In which weights are kept: fp32 (bf16 is autocast above it) or fp64."""
    return torch.float64 if config.train.precision == "fp64" else torch.float32


def _share_out(tensors: Mapping[str, tuple[torch.Size, torch.dtype]], total: int, parts: int) -> list[list[str]]:
    """Neighbouring tensors of like size together, in the order of the model."""
    groups: list[list[str]] = [[]]
    done = 0
    for name, (shape, dtype) in tensors.items():
        if done * parts >= total * len(groups) and len(groups) < parts:
            groups.append([])
        groups[-1].append(name)
        done += shape.numel() * dtype.itemsize
    return groups


def _made(
    names: Iterable[str],
    weights: Weights,
    sources: Mapping[str, Source],
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one at a time."""
    for name in names:
        ours = name.removeprefix("model/")
        source = sources[ours]
        theirs = [weights.read(key) for key in source.keys]
        yield name, _exact(source.form.ours(theirs), tensors[ours][1], source.keys[0].name)


def _exact(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The same numbers in another type.

    Raises:
        ExchangeError: It cannot hold them.
    """
    if not value.is_floating_point():
        raise ExchangeError(name, value.dtype, "weights are numbers of a float type", _FIX)
    made = value.to(dtype)
    if torch.promote_types(value.dtype, dtype) != dtype and not torch.equal(made.to(value.dtype), value):
        raise ExchangeError(name, value.dtype, f"{dtype} holds every number exactly", "train.precision=fp64")
    return made
