"""The routing ledger on disk: what every layer chose for every token of a step, and a run that follows it.

    <run.dir>/routing/step-00000007.part-00001-of-00004.safetensors      a part a step (from 1) and rank

Parts are known by the positions they cover in the global batch, so that ledgers of any two layouts can be compared.
Each part says in its header of what run and batch it is, carries the token ids, and has a checksum.
Shape letters: n rows of this rank, S sequence, T tokens, K experts per token.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.config import Config
from moe_dist.errors import LedgerError
from moe_dist.moe.layer import MoERecord
from moe_dist.moe.ledger import Choices, join
from moe_dist.train import ROUTING_FOLDER

FORMAT = 1
# What two ledgers, or a ledger and a run, must have in common; a run that follows must also have the seed.
SHAPE = ("router", "num_experts", "top_k", "blocks", "sequences", "length")
_PART = re.compile(r"^step-(\d{8,})\.part-(\d{5,})-of-(\d{5,})\.safetensors$")


@dataclass(frozen=True)
class Page:
    """A step, or a range of its tokens.

    Attributes:
        header: Of what run and batch it is.
        token_T: Input token ids, int64.
        choices: By number of the block, all for the same tokens.
    """

    header: dict[str, Any]
    token_T: Tensor
    choices: dict[int, Choices]


@dataclass(frozen=True)
class Place:
    """Which rows of which step a rank holds.

    Attributes:
        step: Updates made before, as in `train_step`.
        first_row: Place of this rank's first row in the global batch.
        sequences: Rows of all ranks.
    """

    step: int
    first_row: int
    sequences: int


class RoutingLedger:
    """Records and follows the routing of a run, as its config says; without either it does nothing.

    Args:
        config: `train.routing_ledger` and `train.routing_replay` say what to do.
        blocks: Numbers of the blocks with experts, in order.
        rank: Of this process.
        ranks: Of the run.

    Raises:
        LedgerError: There is no ledger to follow.
    """

    def __init__(self, config: Config, blocks: Sequence[int], rank: int = 0, ranks: int = 1) -> None:
        self.config, self.blocks, self.rank, self.ranks = config, list(blocks), rank, ranks
        self.records = config.train.routing_ledger == "record"
        self.follows = None if config.train.routing_replay is None else find_ledger(config.train.routing_replay)
        self._parts: list[list[Choices]] = []

    def open_step(self, rows: Tensor, place: Place) -> Mapping[int, Choices] | None:
        """The choices that this rank's rows [n, S+1] are to follow; None where layers choose.

        Raises:
            LedgerError: The step is missing or damaged, or was recorded from other tokens.
        """
        self._parts = []
        if self.follows is None:
            return None
        length = rows.shape[1] - 1
        header = run_header(self.config, self.blocks, (place.sequences, length))
        first, count = place.first_row * length, len(rows) * length
        page = read_page(self.follows, place.step + 1, (first, count))
        where = str(self.follows / f"step-{place.step + 1:08d}")
        check_header(where, page.header, header, (*SHAPE, "seed"))
        other = (page.token_T != rows[:, :-1].flatten().cpu()).nonzero()
        if len(other):
            found = f"token {int(page.token_T[other[0]])} at position {first + int(other[0])}"
            rule = f"the batch has token {int(rows[:, :-1].flatten()[other[0]])} there: the ledger is of other data"
            raise LedgerError(where, found, rule, "replay with the data, tokenizer and seed of the recorded run")
        return {block: choices.map(lambda t: t.to(rows.device)) for block, choices in page.choices.items()}

    def keep(self, records: Sequence[MoERecord], first_row: int, length: int) -> None:
        """Takes down what the layers chose for a micro-batch of sequences of `length` tokens."""
        if self.records:
            self._parts.append([Choices.of(record, first_row * length) for record in records])

    def close_step(self, rows: Tensor, place: Place) -> None:
        """Writes this rank's part of the step; one that an earlier run left is replaced.

        Raises:
            LedgerError: It could not be written.
        """
        if not self.records:
            return
        layers = [join(parts) for parts in zip(*self._parts, strict=True)]
        length = rows.shape[1] - 1
        first, count = place.first_row * length, len(rows) * length
        assert {(layer.first, layer.end) for layer in layers} <= {(first, first + count)}, (
            f"the layers recorded other tokens than {first} to {first + count}, which are in this rank's rows"
        )
        header = run_header(self.config, self.blocks, (place.sequences, length))
        header |= {"first": first, "tokens": count}
        page = Page(header, rows[:, :-1].flatten(), dict(zip(self.blocks, layers, strict=True)))
        write_part(Path(self.config.run.dir) / ROUTING_FOLDER, place.step + 1, (self.rank, self.ranks), page)


def run_header(config: Config, blocks: Sequence[int], batch: tuple[int, int]) -> dict[str, Any]:
    """What a part says of its run and its batch of (sequences, length)."""
    moe, tree = config.model.moe, config.model_dump(mode="json")
    text = json.dumps({name: tree[name] for name in ("seed", "model", "optimizer")}, sort_keys=True)
    header = {"format": FORMAT, "config": hashlib.sha256(text.encode()).hexdigest(), "seed": config.seed}
    header |= {"router": moe.router, "num_experts": moe.num_experts, "top_k": moe.top_k, "blocks": list(blocks)}
    return header | {"sequences": batch[0], "length": batch[1], "train_steps": config.train.steps}


def check_header(where: str, found: Mapping[str, Any], wanted: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses a ledger of another run.

    Raises:
        LedgerError: With the first of the named values that differs.
    """
    for name in names:
        if found[name] != wanted[name]:
            rule = f"{name} is {wanted[name]}: what was recorded fits only a run of the same routing and batch"
            raise LedgerError(where, f"{name} {found[name]}", rule, "use the config that the ledger was recorded with")


def find_ledger(path: str | Path) -> Path:
    """The folder of parts that a path means: itself, or `routing` in a run's directory.

    Raises:
        LedgerError: There is none.
    """
    for folder in (Path(path) / ROUTING_FOLDER, Path(path)):
        if folder.is_dir() and any(_PART.match(file.name) for file in folder.iterdir()):
            return folder
    fix = "record one: moe-dist routing record CONFIG --ranks N --steps S --out DIR"
    raise LedgerError(str(path), "no recorded step", "a ledger is a folder with step-*.safetensors", fix)


def recorded_steps(folder: Path, step: str = "*") -> dict[int, list[Path]]:
    """The parts of every step (from 1), or of that one alone whose eight digits are given, in order.

    Raises:
        LedgerError: A step lacks a part, or has parts of two layouts.
    """
    steps: dict[int, list[tuple[int, int, Path]]] = {}
    for file in sorted(folder.glob(f"step-{step}.part-*")):
        if match := _PART.match(file.name):
            steps.setdefault(int(match[1]), []).append((int(match[2]), int(match[3]), file))
    for number, parts in steps.items():
        if [(part, parts[0][1]) for part in range(parts[0][1])] != [part[:2] for part in parts]:
            found = ", ".join(file.name.partition(".")[2] for *_, file in parts)
            rule = "a step has one part of each rank of one layout; this one was cut off while it was written"
            raise LedgerError(
                str(folder / f"step-{number:08d}"), found, rule, "run that step again, or remove its files"
            )
    return {number: [file for *_, file in parts] for number, parts in sorted(steps.items())}


def read_page(folder: Path, step: int, span: tuple[int, int] | None = None) -> Page:
    """The whole global batch of a step (from 1), or `span` = (first position, tokens) of it.

    Raises:
        LedgerError: The step is missing, or a part is damaged or does not fit the others.
    """
    files = recorded_steps(folder, f"{step:08d}").get(step)
    where = str(folder / f"step-{step:08d}")
    if files is None:
        fix = f"record {step} steps or more, or set train.steps to what was recorded"
        raise LedgerError(where, "missing", "every step that is followed was recorded", fix)
    parts = [read_part(file) for file in files]
    header = parts[0].header
    for file, part in zip(files, parts, strict=True):
        check_header(str(file), part.header, header, (*SHAPE, "seed"))
    parts.sort(key=lambda part: (part.header["first"], part.header["tokens"]))
    try:
        choices = {block: join([part.choices[block] for part in parts]) for block in header["blocks"]}
    except ValueError as gap:
        raise LedgerError(where, gap, "the parts cover every token once", "run that step again") from None
    page = Page(header, torch.cat([part.token_T for part in parts]), choices)
    first, count = span or (0, header["sequences"] * header["length"])
    if len(page.token_T) != header["sequences"] * header["length"] or first + count > len(page.token_T):
        rule = f"the batch has {header['sequences']} sequences of {header['length']} tokens"
        raise LedgerError(where, f"{len(page.token_T)} tokens", rule, "run that step again, or use its own config")
    return Page(header, page.token_T[first : first + count], {b: c.part(first, count) for b, c in choices.items()})


def read_part(file: Path) -> Page:
    """One rank's part of a step.

    Raises:
        LedgerError: It is not what was written.
    """
    fix = "the file is damaged: restore it, or record the step again"
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        header = json.loads(metadata["header"])
        found, wanted = _digest(metadata["header"], tensors), metadata["sha256"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise LedgerError(str(file), error, "a part of a ledger is readable", fix) from None
    if found != wanted:
        raise LedgerError(str(file), f"{found[:16]}...", f"its SHA-256 is {wanted[:16]}...", fix)
    if header["format"] != FORMAT:
        rule = f"this version reads format {FORMAT}"
        raise LedgerError(str(file), header["format"], rule, "use the version of moe_dist that wrote it")
    choices = {}
    for block in header["blocks"]:
        asks_TK = tensors.get(f"{block}.asks")
        expert_TK, kept_TK, gate_TK = (tensors[f"{block}.{name}"] for name in ("expert", "kept", "gate"))
        choices[block] = Choices(header["first"], expert_TK.long(), kept_TK, gate_TK, asks_TK)
    return Page(header, tensors["token"].long(), choices)


def write_part(folder: Path, step: int, share: tuple[int, int], page: Page) -> None:
    """Writes part `share` = (i, of n) of a step beside its place and renames it; sweeps parts of other layouts.

    Raises:
        LedgerError: The disk refused it.
    """
    part, parts = share
    tensors = {"token": page.token_T.int()}
    for block, choices in page.choices.items():
        named = {"expert": choices.expert_TK.int(), "kept": choices.kept_TK, "gate": choices.gate_TK}
        named |= {} if choices.asks_TK is None else {"asks": choices.asks_TK}
        tensors |= {f"{block}.{name}": tensor for name, tensor in named.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    header = json.dumps(page.header, sort_keys=True)
    file = folder / f"step-{step:08d}.part-{part:05d}-of-{parts:05d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}.writing")
        save_file(tensors, draft, {"header": header, "sha256": _digest(header, tensors)})
        draft.replace(file)
        for old in folder.glob(f"step-{step:08d}.part-*.safetensors"):
            match = _PART.match(old.name)
            if match and int(match[3]) != parts:
                old.unlink(missing_ok=True)  # another rank may sweep at the same time
    except (OSError, SafetensorError) as error:
        raise LedgerError(str(file), error, "the routing of every step is recorded", "make room") from None


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
