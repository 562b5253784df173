"""The newest states in host memory outside of the ranks' processes, so that a lost rank costs no steps.

Each rank gives its part, as it would lie in a file, to a keeper that outlives it; what the manifest would say of the
part goes with it. A state counts when all its parts are there: whoever restores puts the manifest together from them
and reads, and proves, as from a disk, in whatever layout. Two states are held at most: the newest that all ranks have
given, and the one that is being given.

A keeper is whatever the launcher has: memory of the launcher itself on one machine, an actor a node on Ray.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from moe_dist.checkpoint import pieces, store
from moe_dist.checkpoint.agree import on_every_rank
from moe_dist.checkpoint.manifest import FORMAT, OLDER, checked, hash_of
from moe_dist.checkpoint.opened import Opened, OpenFile
from moe_dist.checkpoint.save import Saved
from moe_dist.checkpoint.source import Opens, Source
from moe_dist.checkpoint.write import HostCopy
from moe_dist.errors import CheckpointError
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.runtime.generation import Fence

FOLDER = Path("memory")  # the path that a state in memory has in messages: memory/step-00000050
_HASHED = re.compile(rb"\A([0-9a-f]{32})\n")


class Key(NamedTuple):
    """Which state a part is of: those of a later generation are newer, whatever their step."""

    generation: int
    step: int

    @property
    def save(self) -> str:
        """The name of the save, which every part has in its header."""
        return f"memory-{self.generation}-{self.step}"


@dataclass(frozen=True)
class Kept:
    """What is known of a part in memory.

    Attributes:
        key: The state that it is of.
        rank: Who gave it.
        ranks: How many parts the state has.
        layout: For people.
        part: What the manifest says of it.
        stored: What a checkpoint stores beside the tensors, and the rows of the record that no disk has; from rank 0.
    """

    key: Key
    rank: int
    ranks: int
    layout: str
    part: dict[str, Any]
    stored: dict[str, Any] | None

    def to_bytes(self) -> bytes:
        """As text, with its hash before it."""
        text = json.dumps(asdict(self)).encode()
        return f"{hash_of(text)}\n".encode() + text

    @classmethod
    def from_bytes(cls, content: bytes) -> Kept | None:
        """The inverse; None where it is not what was written, as after a kill."""
        head = _HASHED.match(content)
        if head is None or hash_of(content[head.end() :]) != head[1].decode():
            return None
        tree = json.loads(content[head.end() :])
        return cls(**{**tree, "key": Key(*tree["key"])})


@dataclass(frozen=True)
class InMemory:
    """A state in memory all of whose parts are there.

    Attributes:
        key: Which.
        tree: What its manifest would be.
        record: Rows of the record that no disk has.
    """

    key: Key
    tree: dict[str, Any]
    record: list[Any]


class KeeperGone(RuntimeError):
    """What held states is lost, as its node may be: the launcher starts the ranks again from the state before."""


class Keeper(Protocol):
    """Holds parts; what it does may raise, and then counts as not done."""

    def put(self, kept: Kept, content: memoryview, keep: Key | None) -> None:
        """Takes a part of this rank, and lets go of all its others but that of the state `keep`."""

    def find(self) -> list[Kept]:
        """The parts of all ranks that can be reached."""

    def open(self, kept: Kept) -> Opened:
        """A part that was found."""


class MemoryCopies:
    """States of a run in memory, as one rank sees them.

    Args:
        keeper: Holds them.
        mesh: This rank.
        fence: Of which generation this process is.
    """

    def __init__(self, keeper: Keeper, mesh: Mesh, fence: Fence) -> None:
        self.keeper, self.mesh, self.fence = keeper, mesh, fence
        self.name, self.lasting = "memory", False
        self._copy = HostCopy()
        self._whole: Key | None = None

    def give(
        self, model: Transformer, optimizer: torch.optim.Optimizer, saved: Saved, record: Callable[[], list[Any]]
    ) -> None:
        """Gives the state of this moment to the keeper; returns when those of all ranks are there. Entered by all.

        Args:
            model: The model.
            optimizer: Its optimizer.
            saved: What a checkpoint stores beside the tensors.
            record: On rank 0, the rows of the record that no disk has.

        Raises:
            CheckpointError: On every rank alike: some rank's could not be given. The state before is still there.
            KeeperGone: On every rank alike: some rank's keeper is gone.
        """
        mesh, key = self.mesh, Key(self.fence.number, saved.step)
        pinned = next(model.parameters()).device.type != "cpu"
        self._copy.begin(pieces.owned_shapes(model, optimizer, mesh), key.save, saved.step, pinned)
        self._copy.fill(pieces.owned_tensors(model, optimizer, mesh))

        def give() -> bool:
            self.fence.check()
            part, content = self._copy.proven(store.part_name(mesh.rank, mesh.layout.ranks))
            stored = {**asdict(saved), "record": record()} if mesh.rank == 0 else None
            kept = Kept(key, mesh.rank, mesh.layout.ranks, str(mesh.layout), part, stored)
            try:
                self.keeper.put(kept, content, self._whole)
            except KeeperGone:
                return False
            return True

        there = [outcome.unwrap() for outcome in on_every_rank(give, mesh)]
        if not all(there):
            ranks = [rank for rank, given in enumerate(there) if not given]
            raise KeeperGone(f"step {saved.step}: what keeps states of ranks {ranks} is gone")
        self._whole = key

    def find(self) -> list[InMemory]:
        """The states whose parts are all there."""
        by_key: dict[Key, dict[int, Kept]] = {}
        for kept in self.keeper.find():
            by_key.setdefault(kept.key, {}).setdefault(kept.rank, kept)
        found = []
        for key in sorted(by_key, reverse=True):
            parts = [by_key[key][rank] for rank in sorted(by_key[key])]
            stored = parts[0].stored
            if stored is not None and len(parts) == parts[0].ranks:
                told = {name: stored[name] for name in ("step", "config", "data", "state")}
                told |= {"save": key.save, "layout": parts[0].layout, "parts": [kept.part for kept in parts]}
                found.append(InMemory(key, {"format": FORMAT, **told}, stored["record"]))
        return found

    def take(self, key: Key) -> None:
        """This rank goes on from a state: it is kept until the next one is whole."""
        self._whole = key

    def source(self, found: InMemory) -> Source:
        """One of them."""
        path = FOLDER / store.step_name(found.key.step)
        opens = functools.partial(self._opener, found.key)
        return Source(path, found.key.step, 0, lambda: checked(found.tree, str(path)), opens, found.key, found.record)

    def _opener(self, key: Key) -> Opens:
        parts: dict[str, Kept] = {}
        for kept in self.keeper.find():
            if kept.key == key:
                parts.setdefault(kept.part["file"], kept)

        def opens(file: Path) -> Opened:
            if file.name not in parts:
                raise CheckpointError(str(file), "missing", "every part is in some memory", OLDER)
            try:
                return self.keeper.open(parts[file.name])
            except OSError as error:
                raise CheckpointError(str(file), error, "every part is in some memory", OLDER) from None

        return opens


class FileKeeper:
    """Parts in files of memory that another process of this machine owns: two for each rank, and two for their texts.

    Args:
        files: For every rank, twice, the file of a part and that of its text.
    """

    def __init__(self, files: Sequence[Sequence[tuple[Path, Path]]]) -> None:
        self.files = files

    def put(self, kept: Kept, content: memoryview, keep: Key | None) -> None:
        """As `Keeper.put`: written over the slot that may go, whose text is gone until the part is there."""
        here = {slot: self._text(*slot) for slot in self.files[kept.rank]}
        slot = next(slot for slot, old in here.items() if old is None or keep is None or old.key != keep)
        for other, old in here.items():
            if other == slot or (old is not None and old.key != keep):
                _write_over(other[1], memoryview(b""))
        _write_over(slot[0], content)
        _write_over(slot[1], memoryview(kept.to_bytes()))

    def find(self) -> list[Kept]:
        """As `Keeper.find`."""
        slots = [self._text(*slot) for of_rank in self.files for slot in of_rank]
        return [kept for kept in slots if kept is not None]

    def open(self, kept: Kept) -> Opened:
        """As `Keeper.open`."""
        for slot in self.files[kept.rank]:
            if self._text(*slot) == kept:
                # Not `open_file`: the descriptor of another process looks like a link.
                return OpenFile(os.open(slot[0], os.O_RDONLY | os.O_CLOEXEC))
        raise OSError("it is not there any more")

    def _text(self, part: Path, text: Path) -> Kept | None:
        try:
            return Kept.from_bytes(text.read_bytes())
        except FileNotFoundError:
            return None


def _write_over(file: Path, content: memoryview) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        done = 0
        while done < len(content):
            done += os.pwrite(handle, content[done:], done)
        os.ftruncate(handle, len(content))
    finally:
        os.close(handle)
